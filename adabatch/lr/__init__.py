"""How far a step goes. Pure: standard library and numpy, no torch."""
