"""Training and scoring around a transfer: studies, their tables, the demo."""
