"""Scores of answers, and the gates that a run must pass."""
