"""The built-in selectors; importing this package registers them."""

from . import eigen, fft, none, random, svd

__all__ = ["eigen", "fft", "none", "random", "svd"]
