"""The objectives by name, and the module of each. A new objective is such a module and one line here.

Names, not modules: the config knows which objectives there are without importing any of their models.
"""

OBJECTIVES = {
    "align": "flamingo.training.objectives.align",
    "contrastive": "flamingo.training.objectives.contrastive",
    "language": "flamingo.training.objectives.language",
    "flamingo": "flamingo.training.objectives.flamingo",
    "preference": "flamingo.training.objectives.preference",
}
OF_FLAMINGO = ("flamingo", "align")
"""Those that train a Flamingo, and start from one."""
