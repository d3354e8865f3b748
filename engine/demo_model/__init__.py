"""The trained demo model: what it is taught (tasks), how (fast, train), how well (evaluate)."""
