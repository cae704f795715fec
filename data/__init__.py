"""Documents in, the batches of a training step out.

`prepare` turns what people have into `shards`; `store` is where a dataset's documents come from, `order` decides which
come when, `batches` turns documents into tensors, and `loading` delivers them. Begin at `loading/loader.py` to follow a
batch, at `__main__.py` for the commands. Runs from a checkout, never installed; nothing is imported here, so that
`python -m data` starts quickly.
"""
