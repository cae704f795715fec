"""TODO eval/reports."""
