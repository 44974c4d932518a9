"""One pass block by block: what blocks are called with, and each run again for its own sums."""
