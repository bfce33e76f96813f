"""Probes read, while a step runs, how much the partial gradients disagree."""
