"""What a file of packed tensors says of itself, and what is refused.

The file is a safetensors file. A packed tensor is two entries in it: codes under the tensor's own name, and scales
under that name and ``:scales``. What they mean is JSON in the file's metadata, under the one key ``altgrad``
(safetensors writes several keys in an order that differs from run to run)::

    {"version": 1, "metadata": {...the caller's own...}, "tensors": {
        "h.0.attn.weight": {"dtype": "float32", "shape": [64, 64], "packed": {
            "format": {"name": "E3M4", "exponent_bits": 3, "mantissa_bits": 4, "bias": 1, "has_inf": false,
                       "has_nan": false, "has_negative_zero": true},
            "scale": {"kind": "power_of_two", "granularity": "channel", "axes": [0]}}},
        "h.0.attn.bias": {"dtype": "float32", "shape": [64]}}}

Everything is written so that it can be checked: a file whose parts contradict each other is refused, even where one
could guess what was meant. Neither package's name is in it: both write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from altgrad_core.cast_options import granularity_options
from altgrad_core.errors import InputError, naming
from altgrad_core.formats import Format, parse
from altgrad_core.packing import SCALE_KINDS, STORED_AS, PackedLayout, numpy_dtype
from altgrad_core.scaling import Granularity, PerBlock, PerChannel, PerTensor

VERSION = 1
"""Of what is written. A reader takes its own version only."""

METADATA_KEY = "altgrad"
"""The key of the metadata of a safetensors file under which all is said."""

SCALES_SUFFIX = ":scales"
"""What the entry of a tensor's scales has behind the tensor's name."""

_RESERVED = "__metadata__"
_FORMAT_FIELDS = ("exponent_bits", "mantissa_bits", "bias", "has_inf", "has_nan", "has_negative_zero")

Json = Mapping[str, object]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Args:
        shape: of the tensor.
        dtype: of the tensor, as it was and will be.
        layout: what its codes and scales mean; None for a tensor that is stored as it is.
    """

    shape: tuple[int, ...]
    dtype: str
    layout: PackedLayout | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file, the header aside."""
        if self.layout is not None:
            return self.layout.nbytes(self.shape)
        return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize

    def stored(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The entries of the file that hold it: what safetensors calls their dtype, and their shape."""
        if self.layout is None:
            return {name: (STORED_AS[self.dtype], self.shape)}
        layout = self.layout
        return {
            name: (STORED_AS[layout.stored_dtype.name], self.shape),
            name + SCALES_SUFFIX: (STORED_AS[layout.stored_scale_dtype.name], layout.scales_shape(self.shape)),
        }


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        tensors: by name, in the order of their names.
        metadata: the caller's own.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


class OpenFile(Protocol):
    """What is asked of an open ``safetensors.safe_open``."""

    def metadata(self) -> dict[str, str] | None:
        """The metadata of the file."""

    def keys(self) -> list[str]:
        """The names of the entries."""

    def get_slice(self, name: str) -> OpenEntry:
        """An entry that was not read yet."""


class OpenEntry(Protocol):
    """What is asked of an entry."""

    def get_dtype(self) -> str:
        """What safetensors calls the dtype."""

    def get_shape(self) -> Sequence[int]:
        """The shape."""


def written_metadata(tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of the safetensors file that holds these tensors.

    Raises:
        InputError: for names that are no strings or that collide, dtypes that safetensors does not have, and metadata
            that is not strings.
    """
    _check_names(tensors)
    for name, entry in tensors.items():
        if entry.dtype not in STORED_AS:
            raise InputError(f"tensor {name!r} has dtype {entry.dtype}; expected one of {', '.join(STORED_AS)}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError(f"the metadata has {key!r}: {value!r}; expected strings, such as JSON")
    said = {
        "version": VERSION,
        "metadata": dict(metadata),
        "tensors": {name: _entry_json(entry) for name, entry in tensors.items()},
    }
    return {METADATA_KEY: json.dumps(said, sort_keys=True)}


def read_header(path: Path, opened: OpenFile) -> Header:
    """What a file says of itself, if that is in order and agrees with what is in it.

    Args:
        path: the file's name, for messages.
        opened: the file, open.

    Raises:
        InputError: naming the file, the tensor, what was found and what was expected.
    """
    said = (opened.metadata() or {}).get(METADATA_KEY)
    if said is None:
        raise InputError(
            f"{path} holds no packed tensors: its metadata has no {METADATA_KEY!r}; expected a file of save_packed "
            "(a plain safetensors file is for safetensors itself)"
        )
    with naming(f"{path}"):
        header = _header(_parsed(said))
    expected: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for name, entry in header.tensors.items():
        with naming(f"{path}: tensor {name!r}"):
            stored = entry.stored(name)
        expected |= {key: (dtype, shape, name) for key, (dtype, shape) in stored.items()}
    _check_entries(path, opened, expected)
    return header


def unreadable(path: Path, error: Exception) -> InputError:
    """The error for what is no safetensors file, or a part of one."""
    return InputError(f"{path} is no whole safetensors file ({error}); expected one that save_packed wrote")


def check_is_file(path: Path) -> None:
    """Raise what opening the file raises, which names it: safetensors' own error for a folder does not.

    Raises:
        OSError: if the file is missing, a folder, or not to be read.
    """
    with path.open("rb"):
        pass


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, which it replaces when all is written, and not before.

    A file that is read through a memory map must not change, and half a file must not be taken for one.

    Raises:
        OSError: if there can be no such file.
    """
    draft = path.with_name(path.name + ".partial")
    # Made here, so that it may be read by whom new files may be: safetensors (0.8) makes files for their owner alone.
    draft.touch()
    mode = draft.stat().st_mode
    try:
        yield draft
        draft.chmod(mode)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _check_names(tensors: Mapping[str, TensorEntry]) -> None:
    for name, entry in tensors.items():
        if not isinstance(name, str) or not name or name == _RESERVED:
            raise InputError(f"a tensor is named {name!r}; expected a string, not empty and not {_RESERVED!r}")
        if entry.layout is not None and name + SCALES_SUFFIX in tensors:
            raise InputError(
                f"a tensor is named {name + SCALES_SUFFIX!r}, as the scales of {name!r} would be; expected another name"
            )


def _entry_json(entry: TensorEntry) -> dict[str, object]:
    said: dict[str, object] = {"dtype": entry.dtype, "shape": list(entry.shape)}
    if entry.layout is None:
        return said
    known = entry.layout.format
    named = {"name": str(known)} | {field: getattr(known, field) for field in _FORMAT_FIELDS}
    scale = {"kind": entry.layout.scale_kind} | granularity_options(entry.layout.granularity)
    return said | {"packed": {"format": named, "scale": scale}}


def _parsed(said: str) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise InputError(f"the metadata names something twice among {', '.join(key for key, _ in pairs)}")
        return found

    try:
        return json.loads(said, object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"the metadata {METADATA_KEY!r} is no JSON ({error})") from None


def _header(said: object) -> Header:
    version = said.get("version") if isinstance(said, dict) else VERSION
    if type(version) is not int or version != VERSION:
        raise InputError(f"the version is {version!r}; this AltGrad reads version {VERSION}")
    fields = _fields(said, "the metadata", ("version", "metadata", "tensors"))
    metadata = _object(fields["metadata"], "metadata")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"metadata is {metadata!r}; expected strings")
    tensors = {}
    for name, entry in sorted(_object(fields["tensors"], "tensors").items()):
        with naming(f"tensor {name!r}"):
            tensors[name] = _entry(entry)
    _check_names(tensors)
    return Header(tensors, {key: str(value) for key, value in metadata.items()})


def _entry(said: object) -> TensorEntry:
    is_packed = isinstance(said, dict) and "packed" in said
    fields = _fields(said, "its description", ("dtype", "shape", "packed") if is_packed else ("dtype", "shape"))
    dtype, shape = fields["dtype"], _integers(fields["shape"], "shape")
    if not isinstance(dtype, str) or dtype not in STORED_AS:
        raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(STORED_AS)}")
    if any(length < 0 for length in shape):
        raise InputError(f"shape is {list(shape)}; expected lengths of at least 0")
    return TensorEntry(shape, dtype, _layout(fields["packed"], dtype) if is_packed else None)


def _layout(said: object, dtype: str) -> PackedLayout:
    fields = _fields(said, "packed", ("format", "scale"))
    scale = _object(fields["scale"], "scale")
    kind = next((known for known in SCALE_KINDS if known == scale.get("kind")), None)
    if kind is None:
        raise InputError(f"the kind of scale is {scale.get('kind')!r}; expected one of {', '.join(SCALE_KINDS)}")
    return PackedLayout(_format(fields["format"]), _granularity(scale), kind, dtype)


def _format(said: object) -> Format:
    fields = _fields(said, "format", ("name", *_FORMAT_FIELDS))
    name = fields["name"]
    if not isinstance(name, str):
        raise InputError(f"the format's name is {name!r}; expected a string")
    known = parse(name)
    for field in _FORMAT_FIELDS:
        expected, found = getattr(known, field), fields[field]
        if type(found) is not type(expected) or found != expected:
            raise InputError(f"format {name} is said to have {field} {found!r}; expected {expected!r}")
    return known


def _granularity(scale: Json) -> Granularity:
    name = scale.get("granularity")
    if name == "tensor":
        _fields(scale, "scale", ("kind", "granularity"))
        return PerTensor()
    if name == "channel":
        axes = _fields(scale, "scale", ("kind", "granularity", "axes"))["axes"]
        return PerChannel(_integer(axes, "axes") if not isinstance(axes, list) else _integers(axes, "axes"))
    if name == "block":
        fields = _fields(scale, "scale", ("kind", "granularity", "size", "axis"))
        return PerBlock(_integer(fields["size"], "size"), _integer(fields["axis"], "axis"))
    raise InputError(f"the granularity is {name!r}; expected tensor, channel or block")


def _check_entries(path: Path, opened: OpenFile, expected: Mapping[str, tuple[str, tuple[int, ...], str]]) -> None:
    present = set(opened.keys())
    for key, (dtype, shape, name) in expected.items():
        what = "scales" if key != name else "codes or values"
        if key not in present:
            raise InputError(f"{path}: tensor {name!r}: its {what} are missing; expected an entry {key!r}")
        entry = opened.get_slice(key)
        found = entry.get_dtype(), tuple(entry.get_shape())
        if found != (dtype, shape):
            raise InputError(
                f"{path}: tensor {name!r}: its {what} are {found[0]} of shape {found[1]}; expected {dtype} of {shape}"
            )
    unknown = sorted(present - set(expected))
    if unknown:
        raise InputError(f"{path} holds {unknown[0]!r}, of which its metadata says nothing; expected what it names")


def _fields(said: object, what: str, names: tuple[str, ...]) -> Json:
    """An object that has these fields and no other."""
    found = _object(said, what)
    if set(found) != set(names):
        raise InputError(f"{what} has the fields {', '.join(sorted(found)) or 'none'}; expected {', '.join(names)}")
    return found


def _object(said: object, what: str) -> dict[str, object]:
    if not isinstance(said, dict):
        raise InputError(f"{what} is {said!r}; expected an object")
    return said


def _integer(said: object, what: str) -> int:
    if not isinstance(said, int) or isinstance(said, bool):
        raise InputError(f"{what} is {said!r}; expected an integer")
    return said


def _integers(said: object, what: str) -> tuple[int, ...]:
    if not isinstance(said, list):
        raise InputError(f"{what} is {said!r}; expected a list of integers")
    return tuple(_integer(each, what) for each in said)
