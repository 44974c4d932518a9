"""How long a start takes, beside its floor."""
