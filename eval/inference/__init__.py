"""TODO eval/inference."""
