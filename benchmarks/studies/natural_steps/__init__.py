"""Which form of repeated natural steps closes most of the loss gap, without any training step."""
