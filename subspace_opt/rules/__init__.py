"""The built-in rules; importing this package registers them."""

from . import adaptive, averaging, orthogonal, scaling, soap

__all__ = ["adaptive", "averaging", "orthogonal", "scaling", "soap"]
