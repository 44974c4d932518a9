"""Factors of many layers at once: stacks of one shape, who solves what, ranks under a budget."""
