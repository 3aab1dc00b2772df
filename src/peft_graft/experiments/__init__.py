"""Training and scoring around a transfer: teacher, fresh student, grafted student. Needs the extra ``demo``."""
