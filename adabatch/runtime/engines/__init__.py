"""How a model runs on several ranks: ``Engine``, and one file per engine."""
