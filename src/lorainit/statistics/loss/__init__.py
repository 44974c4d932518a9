"""The loss of every sequence by itself."""
