"""A tiny random model of every architecture, and a few rows of data that it takes."""
