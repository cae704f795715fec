"""How a command line becomes a typed config, for training and evaluation alike.

`key=value` arguments and the YAML files of `hydra/` go in; checked dataclasses come out, or one `UserError` that names
every mistake. Begin with `compose.py` (hydra: arguments to plain tables), then read `validate.py` (pydantic: plain
tables to dataclasses).
"""
