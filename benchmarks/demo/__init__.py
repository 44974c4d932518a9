"""The straight line on a real model: statistics, adapters, training, saving, stock PEFT.

``python -m benchmarks.demo`` runs it. Nothing is imported here: `benchmarks.demo.reload` runs in a
process that must not load lorainit.
"""
