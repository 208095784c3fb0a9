"""Linear algebra on stacks of matrices `(B, m, n)`: products, norms, bases, polar factors, cosine transforms. Pure functions.

In: stacks in float32 or float64 (Newton-Schulz also in bfloat16). Out: stacks of the same dtype. The sign of a singular vector is arbitrary
and moments outlive a refresh, so every function that returns a basis fixes the signs by one rule.
"""

from .bases import (
    Method,
    cholesky_qr,
    complete,
    eigenbasis,
    eigh,
    fix_signs,
    leading_right,
    orthonormal,
    singular_bases,
    sketched_right,
    svd,
)
from .products import FUSED, addmm, cpu_has_bfloat16, cpu_has_tiles, mm, symmetric
from .sizes import SAFE, all_finite, divisor, is_readable, magnitude, norm, peak, quotient, ratio, unit, unit_columns

__all__ = [
    "FUSED",
    "SAFE",
    "Method",
    "addmm",
    "all_finite",
    "cholesky_qr",
    "complete",
    "cpu_has_bfloat16",
    "cpu_has_tiles",
    "divisor",
    "eigenbasis",
    "eigh",
    "fix_signs",
    "is_readable",
    "leading_right",
    "magnitude",
    "mm",
    "norm",
    "orthonormal",
    "peak",
    "quotient",
    "ratio",
    "singular_bases",
    "sketched_right",
    "svd",
    "symmetric",
    "unit",
    "unit_columns",
]
