"""The base models of the benchmark."""
