"""Reports: samples go in; tables, curves, HTML reports, comparisons and submission files come out.

`results` writes what a run leaves, `saved_run` reads it again and checks it, and the other modules show it. Nothing
here needs a model. Begin with `results.results_of`.
"""
