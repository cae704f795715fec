"""TODO flamingo/training/memory_plan."""
