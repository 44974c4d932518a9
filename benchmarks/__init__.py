"""Benchmarks and the demo: outside the package, on its public interface only."""
