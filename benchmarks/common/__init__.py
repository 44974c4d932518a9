"""What several benchmarks use: models, tasks, scoring, clocks, random decoders."""
