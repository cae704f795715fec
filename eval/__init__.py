"""Few-shot evaluation: tasks, demonstrations, prompts, one loop, scores with intervals, reports.

Runs from a checkout, never installed. Nothing is imported here, so that `python -m eval` starts quickly.
"""
