"""Scores that can be recomputed: suites of tasks, the harness that runs them, and the statistics of the result."""
