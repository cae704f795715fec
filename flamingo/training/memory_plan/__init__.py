"""The memory plan: in comes a run's config, out comes what each process will need, before anything is allocated.

`dry_run.py` runs one real update on tensors without memory while `ledger.py` counts them; `plan.py` prints the
result or refuses the run. Begin with `plan.py`; `collectives.py` measures what real processes send.
"""
