"""How a model runs on several ranks: one file per engine, and the backward of a micro-batch."""
