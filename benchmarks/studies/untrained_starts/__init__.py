"""How far a start alone goes."""
