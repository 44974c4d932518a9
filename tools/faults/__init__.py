"""Faults at every call site, kills at every file operation, mutated files: the long form of tests/faults."""
