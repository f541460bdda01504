"""Packed tensors in files that ``altgrad_torch/packed_files.py`` reads, and the other way round.

:mod:`altgrad_core.packed_files` says what is in them. safetensors is imported late: only files need it
(``altgrad[storage]``).
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

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
from altgrad_core.packing import check_contents, numpy_dtype
from altgrad_jax.packing import PackedTensor, check_x64


class PackedFile(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: by name, packed or as they were.
        metadata: what was given to :func:`save_packed`.
    """

    tensors: dict[str, PackedTensor | jax.Array]
    metadata: dict[str, str]


def save_packed(
    path: str | PathLike[str],
    tensors: Mapping[str, PackedTensor | jax.Array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors, packed or not, to one safetensors file, which replaces another when it is whole.

    Sharded arrays are gathered on the host.

    Args:
        path: the file.
        tensors: by any names; they are kept as they are.
        metadata: the caller's own strings.

    Raises:
        TypeError: for what is no array.
        InputError: for names that collide, dtypes that safetensors does not have, metadata that is no strings, packed
            tensors whose parts do not fit, and arrays of which other processes hold a part.
        OSError: if the file cannot be written.

    >>> import tempfile
    >>> from altgrad_jax.packing import pack_tensor, unpack_tensor
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_packed(path, {"kernel": pack_tensor(jnp.ones((2, 3)), "E4M3"), "bias": jnp.zeros(3)}, {"step": "7"})
    >>> tensors, metadata = load_packed(path)
    >>> unpack_tensor(tensors["kernel"]).shape, tensors["bias"].shape, metadata
    ((2, 3), (3,), {'step': '7'})
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    said = written_metadata({name: _entry(name, x) for name, x in tensors.items()}, metadata or {})
    stored: dict[str, npt.NDArray[np.generic]] = {}
    for name, x in tensors.items():
        with naming(f"tensor {name!r}"):
            if isinstance(x, PackedTensor):
                codes, scales = _on_host(x.codes), _on_host(x.scales)
                check_contents(x.layout, codes, scales)
                stored[name] = codes.view(x.layout.stored_dtype)
                stored[name + SCALES_SUFFIX] = scales.view(x.layout.stored_scale_dtype)
            else:
                stored[name] = _on_host(x)
    with replacing(Path(path)) as draft:
        try:
            save_file(stored, draft, metadata=said)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def load_packed(path: str | PathLike[str]) -> PackedFile:
    """What :func:`save_packed` wrote, of this package or of ``altgrad_torch``, on the default device.

    Raises:
        InputError: for a file that is not whole, is of another kind or version, or contradicts itself, naming the
            tensor, what was found and what was expected; and for 64-bit dtypes without ``jax.enable_x64``.
        OSError: if the file cannot be read.
    """
    from safetensors import SafetensorError, deserialize, safe_open

    path = Path(path)
    check_is_file(path)
    try:
        with safe_open(path, framework="np") as opened:
            header = read_header(path, opened)
        # Bytes: safetensors finds no NumPy dtype for float8.
        stored = {name: entry["data"] for name, entry in deserialize(path.read_bytes())}
    except SafetensorError as error:
        raise unreadable(path, error) from None
    tensors: dict[str, PackedTensor | jax.Array] = {}
    for name, entry in header.tensors.items():
        with naming(f"{path}: tensor {name!r}"):
            tensors[name] = _tensor(entry, stored[name], stored.get(name + SCALES_SUFFIX))
    return PackedFile(tensors, header.metadata)


def _entry(name: str, x: PackedTensor | jax.Array) -> TensorEntry:
    if isinstance(x, PackedTensor):
        return TensorEntry(x.shape, x.layout.dtype, x.layout)
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"tensor {name!r} is a {type(x).__name__}; expected an array or a PackedTensor")
    return TensorEntry(x.shape, str(x.dtype))


def _tensor(entry: TensorEntry, data: bytes, scales_data: bytes | None) -> PackedTensor | jax.Array:
    layout = entry.layout
    if layout is None or scales_data is None:
        check_x64(entry.dtype, "what was saved")
        return jnp.asarray(np.frombuffer(data, numpy_dtype(entry.dtype)).reshape(entry.shape))
    codes = np.frombuffer(data, layout.code_dtype).reshape(entry.shape)
    scales = np.frombuffer(scales_data, layout.scale_dtype).reshape(layout.scales_shape(entry.shape))
    check_contents(layout, codes, scales)
    return PackedTensor(jnp.asarray(codes), jnp.asarray(scales), layout)


def _on_host(x: jax.Array) -> npt.NDArray[np.generic]:
    """A C-contiguous array, which safetensors takes every array for, without asking."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise InputError(
            "other processes hold a part of it; expected an array that is whole here, such as "
            "jax.experimental.multihost_utils.process_allgather gives"
        )
    return np.asarray(x, order="C")
