"""The built-in selectors; importing this package registers them."""

from . import blocks, eigen, fft, kron_eigen, learned, none, power_iteration, random, svd, switch, top_norm

__all__ = [
    "blocks",
    "eigen",
    "fft",
    "kron_eigen",
    "learned",
    "none",
    "power_iteration",
    "random",
    "svd",
    "switch",
    "top_norm",
]
