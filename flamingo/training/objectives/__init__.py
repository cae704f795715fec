"""What a run trains: in comes the config's `model` table, out comes a `Setup`, ready for the loop in `train.py`.

Each objective is one module with its loss terms, its model, the batch it reads and the folder it writes;
`flamingo/training/objective_table.py` lists them by name. Begin with `protocol.py`, which declares what such a module
provides.
"""
