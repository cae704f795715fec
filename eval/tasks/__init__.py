"""TODO eval/tasks."""
