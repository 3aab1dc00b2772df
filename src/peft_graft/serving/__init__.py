"""Grafts for other programs: merged into their base, and in the forms that servers take."""
