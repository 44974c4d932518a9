"""Tasks as prepared token and image arrays."""
