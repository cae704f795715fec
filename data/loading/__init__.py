"""Datasets in, a `StepBatches` for each training step out, the same for every number of ranks and workers.

`loader` is the iterator that training uses; `step_dataset` makes a batch for (dataset, step, micro-batch), `workers`
runs it in processes that hand batches over in `shared_memory`, and reports what hangs. Begin at
`loader.MixLoader`.
"""
