"""This model inside other people's harnesses, with few-shot images, which neither of them has."""
