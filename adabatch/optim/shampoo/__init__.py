"""Shampoo: the gradient of each matrix is multiplied by inverse roots of its row and column statistics."""

from adabatch.optim.shampoo.optimizer import Shampoo

__all__ = ["Shampoo"]
