"""Labelled examples of classifiers: read from files and data sets, and what is predicted of them scored."""
