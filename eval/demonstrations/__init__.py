"""Demonstrations: a support set and a query go in, the examples to show before the query come out.

`samplers` draws them and refuses those that would show the answer, `retrieval` finds the most similar ones, `ablations`
replaces their images as a control. Begin with `samplers.draw`.
"""
