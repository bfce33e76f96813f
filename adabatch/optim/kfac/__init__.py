"""K-FAC: natural-gradient steps with a Kronecker-factored curvature."""

from adabatch.optim.kfac.damping import Damping, DampingForm, DampingName, Factor, FactorPair
from adabatch.optim.kfac.inversion import Exponents
from adabatch.optim.kfac.optimizer import KFAC
from adabatch.optim.placement import Owner

__all__ = ["KFAC", "Damping", "DampingForm", "DampingName", "Exponents", "Factor", "FactorPair", "Owner"]
