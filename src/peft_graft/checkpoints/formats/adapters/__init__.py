"""AdapterHub's checkpoints: what all kinds have in common, and a file for each kind that can be moved."""
