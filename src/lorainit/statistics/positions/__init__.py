"""Which positions of a layer's input count, read where the model's parts are called."""
