"""Doors in tools that are no trainer of transformers: a file each, imported when it is asked for."""
