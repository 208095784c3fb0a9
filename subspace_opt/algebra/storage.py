"""How slots are stored: in a dtype, or as codes of 8 or 4 bits with a scale for each block. Sizes only, no tensors.

8 bits: dynamic codes in blocks of 256 (arXiv:2110.02861). 4 bits: blocks of 128 (arXiv:2309.01507).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

StateDtype = Literal["fp32", "bf16", "8bit", "4bit"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BITS: dict[str, Literal[4, 8]] = {"8bit": 8, "4bit": 4}
BLOCKS: dict[Literal[4, 8], int] = {8: 256, 4: 128}
LEAST = 4096  # entries below which the table of codes and the scales are not worth it, as in bitsandbytes and torchao


class Codes(NamedTuple):
    """The layout of a coded slot: `bits` per entry, a float32 scale per block, and a table of the values of the codes."""

    bits: Literal[4, 8]
    signed: bool

    def __str__(self) -> str:
        return f"{'signed' if self.signed else 'unsigned'} codes of {self.bits} bits"

    @property
    def block(self) -> int:
        """Entries that share a scale."""
        return BLOCKS[self.bits]

    def nbytes(self, entries: int) -> int:
        """Codes, scales, table."""
        return entries * self.bits // 8 + entries // self.block * 4 + 4 * (1 << self.bits)


def codes(wanted: StateDtype | None, entries: int, *, signed: bool) -> Codes | None:
    """The codes for a slot of `entries` per matrix; None if it is stored in a dtype."""
    if wanted not in BITS or why_not(wanted, entries):
        return None
    return Codes(BITS[wanted], signed)


def why_not(wanted: StateDtype, entries: int) -> str | None:
    """The reason why a slot of `entries` per matrix is not stored as codes."""
    if wanted not in BITS:
        return None
    if entries < LEAST:
        return f"fewer than {LEAST:,} entries"
    block = BLOCKS[BITS[wanted]]
    return f"{entries:,} entries, no multiple of {block}" if entries % block else None
