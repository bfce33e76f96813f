"""What the tests share: engines, launched processes, loops, models that are hard to measure."""
