"""One pass over the batches: hooks on the layers, sums over the counted positions."""
