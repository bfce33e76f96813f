"""A watch over the ranks of a run: where each is, who died or hangs, and an end in bounded time for the others."""
