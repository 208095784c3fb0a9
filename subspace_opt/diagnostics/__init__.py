"""Diagnostics of a run: what the subspace of each layer holds, how it moves, and which guards fired.

In: an optimizer before and after a step. Out: one plain dict a sample, `{"step": ..., "layers": {name: {...}}}`, given to sinks.
On a sampled step the update of each layer is computed a second time from copies, so the run keeps its bits. Other steps pay nothing, and
without an observer no step pays.
"""

from .observer import Observer, Sample, Sink, observe
from .sinks import json_lines, logger, tensorboard

__all__ = ["Observer", "Sample", "Sink", "json_lines", "logger", "observe", "tensorboard"]
