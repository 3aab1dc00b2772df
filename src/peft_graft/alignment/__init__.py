"""How the activation spaces of two models relate: text, tokens, statistics, methods, maps."""
