"""The parameters of a model as the planner knows them: from a module, a function that builds one, or the headers of files."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..arguments import named_parameters
from ..plan import Entry
from .headers import FLOATS, OTHERS, ModelError, Stored, is_stored, read_stored

# Tensors that modules keep beside their parameters, and that files store with them.
BUFFERS = re.compile(
    r"(^|\.)(running_(mean|var)|num_batches_tracked|inv_freq|rotary_emb\.\w+|attn\.(masked_)?bias|position_ids|weight_scale\w*)$"
)
REFERENCE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model, and remarks on how they were found."""

    entries: tuple[Entry, ...]
    remarks: tuple[str, ...] = ()

    @property
    def dtypes(self) -> str:
        """The dtypes of the parameters, as one word."""
        names = dict.fromkeys(str(entry.dtype).removeprefix("torch.") for entry in self.entries)
        return " and ".join(names)


def is_reference(name: str) -> bool:
    """True if the text is `module:function`."""
    return REFERENCE.match(name) is not None and not Path(name).exists()


def find_parameters(name: str, dtype: torch.dtype | None) -> Parameters | None:
    """The parameters of `module:function` or of safetensors files; None if the name is neither.

    Args:
        dtype: The dtype of all parameters; None keeps the dtypes of the module or the files.

    Raises:
        ModelError: The function or the files give no parameters.
    """
    if is_reference(name):
        return Parameters(entries_of(called(name), dtype))
    path = Path(name)
    if not is_stored(path):
        return None
    if not path.exists():
        raise ModelError(f"model: {name} does not exist")
    return _from_files(path, read_stored(path), dtype)


def entries_of(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[Entry, ...]:
    """The parameters of a module, with the roles that it tells.

    Raises:
        SpecError: It has no parameters.
    """
    params, known = named_parameters(model)
    return tuple(
        Entry(
            name=name,
            shape=tuple(p.shape),
            dtype=dtype or p.dtype,
            modules=known["modules"][name],
            frozen=not p.requires_grad,
            role=known["model_roles"][name],
        )
        for name, p in cast(Iterable[tuple[str, Tensor]], params)
    )


def called(reference: str) -> nn.Module:
    """The module that `module:function` returns, built on the meta device. The working directory is searched for the module too.

    Raises:
        ModelError: The import or the call fails, or the result is no `nn.Module`.
    """
    where, _, name = reference.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(where), name)
    except Exception as error:  # code of the user: anything may be raised
        raise ModelError(f"model: {reference} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        with torch.device("meta"):
            made = function() if callable(function) and not isinstance(function, nn.Module) else function
    except Exception as error:
        raise ModelError(
            f"model: {reference}() raised {type(error).__name__}: {error}. The function takes no arguments and builds the model; it runs "
            "on the meta device, where tensors have no values"
        ) from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"model: {reference} gives {type(made).__name__}; it must be a function that returns a torch.nn.Module")
    return made


def _from_files(path: Path, stored: dict[str, Stored], dtype: torch.dtype | None) -> Parameters:
    """The parameters among the tensors of files."""
    buffers = [name for name, one in stored.items() if BUFFERS.search(name) or (one.dtype in OTHERS and not one.shape)]
    left = {name: one for name, one in stored.items() if name not in set(buffers)}
    for name, one in left.items():
        if one.dtype in OTHERS:
            raise ModelError(
                f"{path}: tensor '{name}' is stored as {one.dtype}, which is quantized; give the files of the model before that"
            )
        if one.dtype not in FLOATS and dtype is None:
            raise ModelError(
                f"{path}: tensor '{name}' is stored as {one.dtype}, in which weights are not trained; give the dtype of training, for "
                "example --dtype bfloat16"
            )
    if not left:
        raise ModelError(f"{path}: the files hold no parameters, only {len(buffers)} buffers")
    entries = tuple(Entry(name=name, shape=one.shape, dtype=dtype or FLOATS[one.dtype]) for name, one in left.items())
    return Parameters(entries, tuple(_remarks(buffers, left)))


def _remarks(buffers: Sequence[str], left: dict[str, Stored]) -> list[str]:
    remarks = ["roles are found from names and shapes: files do not tell the modules of a model, nor which weights are tied or frozen"]
    if buffers:
        remarks.append(f"{len(buffers)} tensors are buffers, not parameters, and left out; the first is {buffers[0]}")
    return remarks
