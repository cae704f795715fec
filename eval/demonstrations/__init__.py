"""TODO eval/demonstrations."""
