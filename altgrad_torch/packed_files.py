"""Packed tensors in files that ``altgrad_jax/packed_files.py`` reads, and the other way round.

:mod:`altgrad_core.packed_files` says what is in them. safetensors is imported late: only files need it
(``altgrad[storage]``).
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad_core.errors import InputError, naming
from altgrad_core.packed_files import (
    SCALES_SUFFIX,
    TensorEntry,
    check_is_file,
    read_header,
    replacing,
    unreadable,
    written_metadata,
)
from altgrad_core.packing import check_contents
from altgrad_torch.packing import PackedTensor


class PackedFile(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: by name, packed or as they were.
        metadata: what was given to :func:`save_packed`.
    """

    tensors: dict[str, PackedTensor | Tensor]
    metadata: dict[str, str]


def save_packed(
    path: str | PathLike[str], tensors: Mapping[str, PackedTensor | Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, packed or not, to one safetensors file, which replaces another when it is whole.

    Tensors that share memory, such as tied weights, are written as often as they are named.

    Args:
        path: the file.
        tensors: by any names; they are kept as they are.
        metadata: the caller's own strings.

    Raises:
        TypeError: for what is no tensor.
        InputError: for names that collide, dtypes that safetensors does not have, sparse tensors, metadata that is no
            strings, and packed tensors whose parts do not fit.
        OSError: if the file cannot be written.

    >>> import tempfile
    >>> from altgrad_torch.packing import pack_tensor, unpack_tensor
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_packed(path, {"weight": pack_tensor(torch.ones(2, 3), "E4M3"), "bias": torch.zeros(3)}, {"step": "7"})
    >>> tensors, metadata = load_packed(path)
    >>> unpack_tensor(tensors["weight"]).shape, tensors["bias"].shape, metadata
    (torch.Size([2, 3]), torch.Size([3]), {'step': '7'})
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    said = written_metadata({name: _entry(name, x) for name, x in tensors.items()}, metadata or {})
    stored: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if isinstance(x, PackedTensor):
            codes, scales = x.codes.cpu().contiguous(), x.scales.cpu().contiguous()
            with naming(f"tensor {name!r}"):
                check_contents(x.layout, codes.numpy(), scales.numpy())
            stored[name] = codes.view(_dtype(x.layout.stored_dtype.name))
            stored[name + SCALES_SUFFIX] = scales.view(_dtype(x.layout.stored_scale_dtype.name))
        else:
            stored[name] = x.detach().cpu().contiguous()
    with replacing(Path(path)) as draft:
        try:
            save_file(_apart(stored), draft, metadata=said)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def load_packed(path: str | PathLike[str], device: torch.device | str = "cpu") -> PackedFile:
    """What :func:`save_packed` wrote, of this package or of ``altgrad_jax``, on a device.

    Raises:
        InputError: for a file that is not whole, is of another kind or version, or contradicts itself, naming the
            tensor, what was found and what was expected.
        OSError: if the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    check_is_file(path)
    tensors: dict[str, PackedTensor | Tensor] = {}
    try:
        with safe_open(path, framework="pt") as opened:
            header = read_header(path, opened)
            for name, entry in header.tensors.items():
                with naming(f"{path}: tensor {name!r}"):
                    scales = None if entry.layout is None else opened.get_tensor(name + SCALES_SUFFIX)
                    tensors[name] = _tensor(entry, opened.get_tensor(name), scales, device)
    except SafetensorError as error:
        raise unreadable(path, error) from None
    return PackedFile(tensors, header.metadata)


def _entry(name: str, x: PackedTensor | Tensor) -> TensorEntry:
    if isinstance(x, PackedTensor):
        return TensorEntry(tuple(x.shape), x.layout.dtype, x.layout)
    if not isinstance(x, Tensor):
        raise TypeError(f"tensor {name!r} is a {type(x).__name__}; expected a tensor or a PackedTensor")
    if x.layout != torch.strided:
        raise InputError(f"tensor {name!r} is sparse ({x.layout}); expected a dense one, as x.to_dense() gives")
    return TensorEntry(tuple(x.shape), str(x.dtype).removeprefix("torch."))


def _tensor(
    entry: TensorEntry, stored: Tensor, scales: Tensor | None, device: torch.device | str
) -> PackedTensor | Tensor:
    layout = entry.layout
    if layout is None or scales is None:
        return stored.to(device)
    codes, scales = stored.view(_dtype(layout.code_dtype.name)), scales.view(_dtype(layout.scale_dtype.name))
    check_contents(layout, codes.numpy(), scales.numpy())
    return PackedTensor(codes.to(device), scales.to(device), layout)


def _apart(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors no two of which share memory: safetensors refuses those that do."""
    seen: set[int] = set()
    apart = {}
    for name, x in stored.items():
        storage = x.untyped_storage().data_ptr()
        apart[name] = x.clone() if storage in seen else x
        seen.add(storage)
    return apart


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)
