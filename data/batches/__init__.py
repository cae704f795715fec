"""TODO data/batches."""
