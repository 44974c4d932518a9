"""The honest benchmark: every method, the same learning-rate search, seeds, and intervals."""
