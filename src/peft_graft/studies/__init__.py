"""Studies: many transfers at once, declared in one file, from training the teachers to the tables."""
