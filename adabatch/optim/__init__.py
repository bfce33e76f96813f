"""Torch optimizers that torch lacks; they know nothing of batches or ranks."""

from adabatch.optim import mup
from adabatch.optim.adagrad_norm import AdaGradNorm
from adabatch.optim.kfac import KFAC
from adabatch.optim.shampoo import Shampoo

__all__ = ["KFAC", "AdaGradNorm", "Shampoo", "mup"]
