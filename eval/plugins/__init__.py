"""This model inside other people's harnesses, with few-shot pictures, which neither of them has."""
