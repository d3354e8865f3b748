"""The main screen, and the two that open over it: help and an op's contract."""
