"""Makes torchvision importable beside a CPU build of torch: importing this module is enough.

PyPI's torchvision has kernels for CUDA, and a CPU build of torch cannot load their library. torchvision itself goes on without its operators,
but then registers shape functions for two of them, which raises. timm needs none of them, so it is enough that they are declared.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
library: torch.library.Library | None = None  # the declarations end with this object

if importlib.util.find_spec("torchvision") is not None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + SCHEMA)
        importlib.import_module("torchvision")
