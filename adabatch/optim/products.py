"""Products of a matrix and its own transpose, of which second-order statistics are made, from bfloat16 if wanted."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(rows: Tensor, *, bfloat16: bool) -> Tensor:
    r"""``rows^T rows``, shape (..., d, d), in the dtype of the rows.

    With ``bfloat16`` the rows are rounded to bfloat16, their products are added in float32, and the sums are rounded to
    bfloat16. Each rounding changes an entry by at most 2^-8 of itself. That of the rows leaves the result positive
    semidefinite, since both factors are the same rounded matrix ``R``. That of the sums may make eigenvalues as low as

        -2^-8 |R^T R|_F  >=  -2^-8 trace(R^T R)

    so a damping above 0.004 of the trace keeps the statistic positive definite. The whole error has a spectral norm of
    at most 1.2 % of the trace. (CUDA may round partial sums too:
    ``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction``.)

    Args:
        rows: shape (..., n, d).
        bfloat16: see ``check_bfloat16``.
    """
    if not bfloat16:
        return rows.mT @ rows
    # Nothing that all supported versions of torch have on all devices returns float32 here. torch.mm(out_dtype=) is new
    # and for CUDA only.
    rounded = rows.bfloat16()
    return (rounded.mT @ rounded).to(rows.dtype)


def check_bfloat16(dtype: torch.dtype, device: torch.device, optimizer: str) -> None:
    """Raises ``ValueError`` if the statistics of such parameters cannot be made of products in bfloat16."""
    if dtype is torch.float64:
        raise ValueError(
            f"bfloat16_products would spoil the float64 statistics that {optimizer} keeps of float64 parameters: leave "
            f"it at False for them"
        )
    if not _multiplies(device):
        raise ValueError(
            f"bfloat16_products needs a CPU or a CUDA device of compute capability 8.0, and a parameter of {optimizer} "
            f"is on {device}: leave it at False there"
        )


def _multiplies(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself. Any CPU does, but slowly if it has no instructions for it."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # the answer is about the current device
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type in ("cpu", "meta")
