"""TODO flamingo/inference."""
