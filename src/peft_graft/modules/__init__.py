"""What was trained: a file for each kind of module."""
