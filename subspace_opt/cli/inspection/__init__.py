"""The command `inspect`: what a saved state says about its subspaces.

In: a checkpoint: a file of `torch.save`, a folder of a lab run, or a folder of snapshots. Out: a table or JSON, a picture, and the names of
the layers whose rank is too small or wasted.
"""

from .command import inspect

__all__ = ["inspect"]
