"""Training: in comes a typed config and a loader of batches, out come a run folder, checkpoints and a finished model.

The loop is `train.py` at the root and uses each part once: objectives, sharding, optimizer, checkpoints, metrics, plan.
Begin there, then with `config.py`, which says what a run can be.
"""
