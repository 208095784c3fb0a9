"""The built-in rules; importing this package registers them."""

from . import adaptive, averaging, grouped, ldadam, orthogonal, residual, scaling, soap

__all__ = ["adaptive", "averaging", "grouped", "ldadam", "orthogonal", "residual", "scaling", "soap"]
