"""Stacks of adapters that train at once, and what they are checked against."""
