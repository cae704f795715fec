"""TODO eval/prompting."""
