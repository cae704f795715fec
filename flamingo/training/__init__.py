"""Training: loss, optimizer, parallel plan, checkpoints, metrics. The engine that uses them is `train.py`."""
