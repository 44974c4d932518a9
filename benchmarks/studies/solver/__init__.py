"""Ways to solve, beside one another."""
