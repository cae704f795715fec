"""Rating by people: finished runs go in, blinded sheets come out; filled sheets go in, shares and agreement come out.

`python -m eval rate RUN [RUN]` plans who rates what (`plan.py`) and writes a page and a table for each rater
(`sheets.py`); `rate --read FILES` checks what comes back (`filled.py`), counts it (`summary.py`) and writes the report.
Begin with `plan.Plan`.
"""
