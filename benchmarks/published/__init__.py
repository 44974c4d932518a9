"""Blocks of figures on the project's pages, made from the kept records."""
