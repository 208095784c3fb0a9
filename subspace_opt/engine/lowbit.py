"""Slots stored as codes of 8 or 4 bits with one scale per block. Codes are torchao's tensors. torchao is imported only if a plan has codes.

8 bits: dynamic codes in blocks of 256 (arXiv:2110.02861). 4 bits: blocks of 128 (arXiv:2309.01507). A slot is stored as codes if each
matrix has enough entries to gain by it, and if its entries fill whole blocks. No block then reaches into the next matrix of a stack.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ..algebra.storage import BLOCKS, Codes

RUN = {"cpu": 2**17}  # entries that are coded in one call: torchao makes several temporaries of 8 bytes per entry
RUN_ELSEWHERE = 2**24
BITS_OF: dict[str, Literal[4, 8]] = {"OptimState8bit": 8, "OptimState4bit": 4}
REMEDY = "pip install 'subspace-opt[lowbit]'"


class LowBitError(ImportError):
    """A slot is to be stored in 8 or 4 bits, and torchao cannot be imported."""


def torchao_types() -> dict[Literal[4, 8], Any]:
    """The tensor classes by number of bits. Importing them also tells `torch.load` that they are safe.

    Raises:
        LowBitError: torchao is not installed, or does not work with the installed torch.
    """
    try:
        from torchao.optim.subclass_4bit import OptimState4bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise LowBitError(f"`state_dtype` 8bit and 4bit need torchao, which cannot be imported ({error}). Run: {REMEDY}") from error
    _make_clonable(OptimState8bit)
    _make_clonable(OptimState4bit)
    return {8: OptimState8bit, 4: OptimState4bit}


@functools.cache
def _make_clonable(cls: Any) -> None:
    """Register `clone`, which torchao leaves out and `copy.deepcopy` needs, in torchao's own table of operations."""

    @cls.implements(torch.ops.aten.clone.default)  # type: ignore[untyped-decorator]
    def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
        return copied(args[0], args[0].device)


def zeros(shape: tuple[int, ...], how: Codes, device: torch.device) -> Tensor:
    """A slot of zeros, stored as codes."""
    made: Tensor = torchao_types()[how.bits].zeros(shape, signed=how.signed, block_size=how.block, device=device, dtype=torch.float32)
    return made


def coded(value: Tensor, how: Codes) -> Tensor:
    """Numbers as codes. Numbers that were read from codes are coded without any loss: reading them again gives the same bits."""
    made = zeros(tuple(value.shape), how, value.device)
    flat = value.reshape(-1)
    write(made, 0, flat)
    astray = (read(made, 0, flat.numel(), flat.dtype) != flat).view(-1, how.block).any(-1)
    if astray.any():
        _with_lowest(made, flat.view(-1, how.block), astray)
    return made


def _with_lowest(made: Any, numbers: Tensor, astray: Tensor) -> None:
    """Correct the scales of the blocks in `astray`, whose largest magnitude belongs to the lowest entry of the code table.

    The table's highest entry is 1, and its lowest entry has a magnitude below 1. The scale of such a block is its largest magnitude
    divided by the magnitude of the lowest entry, up to rounding. The neighbouring floating-point numbers are tried until one gives the
    numbers back.
    """
    from torchao.optim.quant_utils import quantize_4bit_with_qmap, quantize_8bit_with_qmap

    bits = BITS_OF[type(made).__name__]
    quantize = {8: quantize_8bit_with_qmap, 4: quantize_4bit_with_qmap}[bits]
    first = numbers.abs().amax(-1) / made.qmap.min().abs()
    for step in (0, 1, -1, 2, -2):
        scale = first.clone()
        for _ in range(abs(step)):
            scale = torch.nextafter(scale, torch.full_like(scale, torch.inf if step > 0 else -torch.inf))
        entries = quantize((numbers / scale.unsqueeze(-1)).view(-1), made.qmap).view(numbers.shape)
        right = astray & (made.qmap[entries.int()] * scale.unsqueeze(-1) == numbers).all(-1)
        packed = entries if bits == 8 else (entries[:, ::2] << 4) | entries[:, 1::2]
        made.codes.view(numbers.size(0), -1)[right] = packed[right]
        made.scale[right] = scale[right]
        astray = astray & ~right


def found(value: Any) -> Codes | None:
    """How a tensor is coded; None if it holds plain numbers."""
    if not hasattr(value, "codes"):
        return None
    kept = next((bits for bits, cls in torchao_types().items() if isinstance(value, cls)), None)
    return None if kept is None or value.block_size != BLOCKS[kept] else Codes(kept, bool(value.signed))


def whole(value: Tensor) -> Tensor:
    """All entries as numbers, whether the tensor is coded or not."""
    return value if found(value) is None else read(value, 0, value.numel(), torch.float32).view(value.shape)


def read(value: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Entries `start` to `stop` of a coded tensor as flat numbers. Both are multiples of the block size."""
    out = torch.empty(stop - start, dtype=dtype, device=value.device)
    for a, b in _runs(value, start, stop):
        out[a - start : b - start] = _part(value, a, b).dequantize()
    return out


def write(value: Tensor, start: int, entries: Tensor, gate: Tensor | None = None) -> None:
    """Code the flat numbers `entries` and write them to a coded tensor, from entry `start` on, unless the 0-d `gate` is closed."""
    for a, b in _runs(value, start, start + entries.numel()):
        part = _part(value, a, b)
        before = None if gate is None else (part.codes.clone(), part.scale.clone())
        part.copy_(entries[a - start : b - start].to(torch.float32))
        if gate is not None and before is not None:
            for raw, old in zip((part.codes, part.scale), before, strict=True):
                raw.copy_(torch.where(gate, raw, old))


def copied(value: Any, device: torch.device) -> Tensor:
    """A copy of a coded tensor, with its own storage, on a device."""
    entries, scale, table = (part.detach().to(device, copy=True) for part in (value.codes, value.scale, value.qmap))
    made: Tensor = _like(value, entries, scale, table, tuple(value.shape))
    return made


def _runs(value: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
    run = RUN.get(value.device.type, RUN_ELSEWHERE)
    yield from ((a, min(a + run, stop)) for a in range(start, stop, run))


def _part(value: Any, start: int, stop: int) -> Any:
    """A view of entries `start` to `stop` of a coded tensor."""
    per_byte = value.numel() // value.codes.numel()
    entries = value.codes.view(-1)[start // per_byte : stop // per_byte]
    scale = value.scale[start // value.block_size : stop // value.block_size]
    return _like(value, entries, scale, value.qmap, (stop - start,))


def _like(value: Any, entries: Tensor, scale: Tensor, table: Tensor, shape: tuple[int, ...]) -> Any:
    shaped = (shape,) if isinstance(value, torchao_types()[4]) else ()  # 8-bit codes have the slot's shape
    return type(value)(entries, scale, table, value.signed, *shaped, dtype=torch.float32)
