"""How far a step goes. Pure: standard library and numpy, no torch."""

from adabatch.lr.shapes import (
    Shape,
    constant,
    cosine,
    exp_hyperbolic,
    hyperbolic,
    inverse_sqrt,
    linear,
    piecewise,
    polynomial,
    tabulated,
    warmup_factor,
    wsd,
)

__all__ = [
    "Shape",
    "constant",
    "cosine",
    "exp_hyperbolic",
    "hyperbolic",
    "inverse_sqrt",
    "linear",
    "piecewise",
    "polynomial",
    "tabulated",
    "warmup_factor",
    "wsd",
]
