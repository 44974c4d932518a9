"""One page of pictures and words about statistics and a start."""
