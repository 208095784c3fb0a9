"""When the Triton kernel of `triangle` serves a symmetric product. Without it, PyTorch's products serve all."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: The least side k of `(k, k)` for the kernel. Below it, PyTorch's full product is expected to be faster. To be measured on a GPU:
#: `benchmarks/kernels.py --device cuda`.
LEAST_SIDE = 2048
SWITCH = "SUBSPACE_OPT_TRITON"  # environment variable; 0 switches the kernel off
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs kernels on CPU tensors, for tests

_least: list[int | None] = []  # what `triton_from` asks for, the innermost last


@functools.cache
def has_triton() -> bool:
    """True if Triton is installed and the environment allows it.

    Raises:
        ValueError: The environment variable `SUBSPACE_OPT_TRITON` is neither 0 nor 1.
    """
    wanted = os.environ.get(SWITCH, "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"the environment variable {SWITCH} is {wanted!r}; set 0 to use PyTorch's products only, or 1 to allow Triton's")
    return wanted == "1" and importlib.util.find_spec("triton") is not None


@contextmanager
def triton_from(least: int | None) -> Iterator[None]:
    """Use the kernel for symmetric products `(k, k)` with k >= `least`; None: never."""
    _least.append(least)
    try:
        yield
    finally:
        _least.pop()


def serves(a: Tensor) -> bool:
    """True if the kernel computes a symmetric product whose first factor is `a` `(k, n)` or `(B, k, n)`.

    It serves NVIDIA GPUs from compute capability 8.0 on, in bfloat16 and float16. It serves float32 only if products may use TF32, because
    tensor cores have no exact float32. In Triton's interpreter it serves whatever `triton_from` asks for.
    """
    least = _least[-1] if _least else LEAST_SIDE
    if least is None or a.size(-2) < least or not has_triton():
        return False
    if INTERPRETED:
        return bool(_least)
    quick = a.dtype in (torch.bfloat16, torch.float16)
    if not quick and not (a.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"):
        return False
    return a.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(a.device) >= (8, 0)


def symmetric(a: Tensor, b: Tensor, c: Tensor | None, beta: float, alpha: float) -> Tensor:
    """`products.symmetric` of matrices or stacks by the kernel."""
    from .triangle import symmetric as by_kernel

    if a.dim() == 2:
        return symmetric(a.unsqueeze(0), b.unsqueeze(0), None if c is None else c.unsqueeze(0), beta, alpha)[0]
    out: Tensor = by_kernel(a, b, c, beta, alpha)
    return out
