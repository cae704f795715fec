"""Scores, each a small pure function, and the intervals around their means."""
