"""Several processes: in come a model and a launcher's environment, out come sharded weights and one common end.

`launch.py` finds out who a process is, `fsdp.py` shards over the `units.py` of a model, `interruptions.py` ends a run.
Begin with `fsdp.py`; `conformance.py` and `traffic.py` check and measure it.
"""
