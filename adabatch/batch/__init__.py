"""How many examples the next step takes. Pure: standard library and numpy, no torch."""
