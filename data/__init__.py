"""From documents on disk to the batches of a training step: shards, index, order, decoding, windows, loader.

Runs from a checkout, never installed. Nothing is imported here, so that `python -m data` starts quickly.
"""
