"""Shampoo: every matrix's gradient, multiplied by inverse roots of its row and column statistics."""

from adabatch.optim.shampoo.optimizer import Shampoo

__all__ = ["Shampoo"]
