"""What the methods' objectives say, on models where the truth is known."""
