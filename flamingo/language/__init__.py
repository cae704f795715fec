"""TODO flamingo/language."""
