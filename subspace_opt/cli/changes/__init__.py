"""The commands `diff`, `explain-change` and `convert`: from one optimizer to another.

In: two specs; a model's name; a checkpoint. Out: tables or JSON; a new checkpoint.
"""

from .checkpoint import convert
from .specs import diff, explain_change

__all__ = ["convert", "diff", "explain_change"]
