"""Studies that compare systems with each other."""
