"""One widget per file. Widgets show what they are given and post messages; none talks to a session."""
