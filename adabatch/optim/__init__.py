"""Torch optimizers that torch lacks; they know nothing of batches or ranks."""
