"""Metrics: answers and gold answers go in, scores with 95 % intervals come out.

Scores of one answer are in `text` and the modules that it names, metrics of a whole set in `table`, intervals in
`interval`. All are small pure functions; begin with `table.measure`.
"""
