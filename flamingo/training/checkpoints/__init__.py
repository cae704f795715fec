"""Checkpoints: in come the trained weights, the optimizer and the loader's position, out come folders to resume from.

A folder is complete when its marker is there, which is written last; frozen weights are left out and identified by a
fingerprint. Begin with `Checkpoints` in `store.py`; `ema.py` keeps the moving average that is saved with them.
"""
