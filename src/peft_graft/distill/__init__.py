"""Learning from the teacher's answers on unlabelled text: heads, layers, polish, verdict."""
