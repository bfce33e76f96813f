"""What ends or saves a run in trouble: lost ranks, signals, drift, numbers that are not finite, and memory."""
