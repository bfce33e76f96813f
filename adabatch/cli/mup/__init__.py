"""``adabatch mup``: width plans, the coordinate check and the sweep over widths."""
