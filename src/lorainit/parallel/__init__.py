"""Many processes as one: collectives, exchange of tensors, sharded models."""
