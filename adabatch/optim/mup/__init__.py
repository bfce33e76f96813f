"""Width plans: settings tuned on a narrow model hold on a wide one (maximal update parameterization).

with torch.device("meta"):
    base = Model(width=64)
plan = mup.plan(model, base)
mup.init_(model, plan)
optimizer = torch.optim.AdamW(plan.groups(model, "adamw", lr=3e-3))
"""

from adabatch.optim.mup.coordinates import Coordinate, CoordinateCheck, coordinate_check
from adabatch.optim.mup.entry import Entry
from adabatch.optim.mup.guard import check_ratios, guard
from adabatch.optim.mup.init import attention_scale, init_
from adabatch.optim.mup.laws import AdamLaw, KFACLaw, Law, MuonLaw, SGDLaw, ShampooLaw
from adabatch.optim.mup.methods import optimizers_for
from adabatch.optim.mup.names import named_modules, named_parameters
from adabatch.optim.mup.planning import plan
from adabatch.optim.mup.plans import Plan
from adabatch.optim.mup.sweep import Run, Sweep, transfer_sweep

__all__ = [
    "AdamLaw",
    "Coordinate",
    "CoordinateCheck",
    "Entry",
    "KFACLaw",
    "Law",
    "MuonLaw",
    "Plan",
    "Run",
    "SGDLaw",
    "ShampooLaw",
    "Sweep",
    "attention_scale",
    "check_ratios",
    "coordinate_check",
    "guard",
    "init_",
    "named_modules",
    "named_parameters",
    "optimizers_for",
    "plan",
    "transfer_sweep",
]
