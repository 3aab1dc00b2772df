"""What a module attaches to: families of models, their architecture, and how they are loaded."""
