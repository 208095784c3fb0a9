"""The built-in selectors, one idea a file. Importing this package imports every file in it, and so registers its kinds.

In: a source matrix and the selector's state. Out: a basis. A new selector needs only a new file here.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
