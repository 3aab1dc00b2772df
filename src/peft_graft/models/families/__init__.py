"""The table of model families, a file for each group of relatives."""
