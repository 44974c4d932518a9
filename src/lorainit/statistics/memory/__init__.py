"""What a pass takes, and how it is divided where that is too much."""
