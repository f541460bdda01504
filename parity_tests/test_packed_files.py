"""What is no file of packed tensors, or not quite one: both packages refuse it, in the same words."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import altgrad_jax
import altgrad_torch
from altgrad_core.errors import InputError
from altgrad_torch import pack_tensor, save_packed

Said = dict[str, Any]
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Said, Arrays]:
    """What a sound file says and holds."""
    x = torch.linspace(-3, 3, 12).reshape(3, 4)
    packed = {
        "narrow": pack_tensor(x, "E3M4", granularity="channel"),
        "own": pack_tensor(x, "E4M3"),
        "blocks": pack_tensor(x, "E2M1", granularity="block2"),
        "ratio": pack_tensor(x, "E2M5", scale="ratio"),
        "plain": x,
    }
    path = tmp_path_factory.mktemp("sound") / "file"
    save_packed(path, packed)
    header = _header(path.read_bytes())
    arrays = {name: part.codes.cpu().numpy() for name, part in packed.items() if name not in ("plain", "own")}
    arrays |= {f"{name}:scales": part.scales.cpu().numpy() for name, part in packed.items() if name != "plain"}
    arrays["own"] = packed["own"].codes.cpu().numpy().view(ml_dtypes.float8_e4m3fn)
    arrays["blocks:scales"] = arrays["blocks:scales"].view(ml_dtypes.float8_e8m0fnu)
    arrays["plain"] = x.cpu().numpy()
    return json.loads(header["__metadata__"]["altgrad"]), arrays


def _header(data: bytes) -> Said:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def _refused(path: Path) -> str:
    """What both say of a file that they refuse."""
    with pytest.raises(InputError) as mine:
        altgrad_jax.load_packed(path)
    with pytest.raises(InputError) as yours:
        altgrad_torch.load_packed(path)
    assert str(mine.value) == str(yours.value)
    assert str(mine.value).startswith(str(path))
    return str(mine.value).removeprefix(str(path))


def _format(said: Said, name: str = "narrow") -> Said:
    return said["tensors"][name]["packed"]["format"]


def _scale(said: Said, name: str = "narrow") -> Said:
    return said["tensors"][name]["packed"]["scale"]


def _set(place: Callable[[Said], Said], key: str, value: object) -> Callable[[Said, Arrays], None]:
    def change(said: Said, arrays: Arrays) -> None:
        place(said)[key] = value

    return change


def _array(name: str, value: np.ndarray) -> Callable[[Said, Arrays], None]:
    def change(said: Said, arrays: Arrays) -> None:
        arrays[name] = value

    return change


def _without(name: str) -> Callable[[Said, Arrays], None]:
    def change(said: Said, arrays: Arrays) -> None:
        del arrays[name]

    return change


def _unsaid(said: Said, arrays: Arrays) -> None:
    del said["tensors"]["plain"]


def _no_bias(said: Said, arrays: Arrays) -> None:
    del _format(said)["bias"]


def _renamed(said: Said, arrays: Arrays) -> None:
    said["tensors"][""] = said["tensors"].pop("plain")


def _another_with_the_name_of_scales(said: Said, arrays: Arrays) -> None:
    said["tensors"]["narrow:scales"] = {"dtype": "float32", "shape": [1, 4]}


DAMAGE: dict[str, tuple[Callable[[Said, Arrays], None], str]] = {
    "a later version": (_set(lambda said: said, "version", 2), ": the version is 2; this AltGrad reads version 1"),
    "true is no version": (_set(lambda said: said, "version", True), ": the version is True; this AltGrad reads"),
    "a number is no version": (_set(lambda said: said, "version", 1.0), ": the version is 1.0; this AltGrad reads"),
    "a field more": (
        _set(lambda said: said, "more", 1),
        ": the metadata has the fields metadata, more, tensors, version",
    ),
    "its own metadata": (_set(lambda said: said, "metadata", {"a": 1}), ": metadata is {'a': 1}; expected strings"),
    "no tensors": (_set(lambda said: said, "tensors", []), ": tensors is []; expected an object"),
    "another bias": (_set(_format, "bias", 3), ": tensor 'narrow': format E3M4 is said to have bias 3; expected 1"),
    "another format": (
        _set(_format, "name", "float8_e3m4"),
        ": tensor 'narrow': format float8_e3m4 is said to have bias 1; expected 3",
    ),
    "other bits": (_set(_format, "mantissa_bits", 3), "format E3M4 is said to have mantissa_bits 3; expected 4"),
    "a number for truth": (_set(_format, "has_nan", 0), "format E3M4 is said to have has_nan 0; expected False"),
    "true for a number": (_set(_format, "bias", True), "format E3M4 is said to have bias True; expected 1"),
    "no format": (_set(_format, "name", "E3M5x"), ": tensor 'narrow': unknown format 'E3M5x'"),
    "a format of scales": (
        _set(
            lambda said: said["tensors"]["own"]["packed"],
            "format",
            {
                "name": "float8_e8m0fnu",
                "exponent_bits": 8,
                "mantissa_bits": 0,
                "bias": 127,
                "has_inf": False,
                "has_nan": True,
                "has_negative_zero": False,
            },
        ),
        "float8_e8m0fnu has no sign and no zero",
    ),
    "a format too wide": (
        _set(
            lambda said: said["tensors"]["own"]["packed"],
            "format",
            {
                "name": "float32",
                "exponent_bits": 8,
                "mantissa_bits": 23,
                "bias": 127,
                "has_inf": True,
                "has_nan": True,
                "has_negative_zero": True,
            },
        ),
        "float32 has 32 bits; codes are made for formats of at most 16",
    ),
    "no bias": (_no_bias, ": tensor 'narrow': format has the fields exponent_bits, has_inf"),
    "another rule": (
        _set(_scale, "kind", "median"),
        "the kind of scale is 'median'; expected one of power_of_two, ratio",
    ),
    "a rule for blocks": (_set(_scale, "kind", "mx"), "scale='mx' is a rule for blocks"),
    "another granularity": (
        _set(_scale, "granularity", "row"),
        "granularity is 'row'; expected tensor, channel or block",
    ),
    "axes of a block": (_set(_scale, "granularity", "block"), "scale has the fields axes, granularity, kind; expected"),
    "another axis": (_set(_scale, "axes", 0), "its scales are F32 of shape (1, 4); expected F32 of (3, 1)"),
    "no such axis": (_set(_scale, "axes", 2), ": tensor 'narrow': axis 2 is out of range for an array of 2 axes"),
    "axes of no kind": (_set(_scale, "axes", [0.5]), "axes is 0.5; expected an integer"),
    "another block": (
        _set(lambda said: _scale(said, "blocks"), "size", 4),
        ": tensor 'blocks': its scales are F8_E8M0 of shape (3, 2); expected F8_E8M0 of (3, 1)",
    ),
    "no block": (_set(lambda said: _scale(said, "blocks"), "size", 0), "the block size is 0; expected an integer"),
    "blocks by ratios": (
        _set(lambda said: _scale(said, "blocks"), "kind", "ratio"),
        "its scales are F8_E8M0 of shape (3, 2); expected F32 of (3, 2)",
    ),
    "ratios as powers of two": (
        _set(lambda said: _scale(said, "ratio"), "kind", "power_of_two"),
        ": tensor 'ratio': a scale is 0.38",
    ),
    "another dtype": (
        _set(lambda said: said["tensors"]["narrow"], "dtype", "int8"),
        "unknown dtype to pack 'int8'; Expected one of float32, bfloat16, float16, float64",
    ),
    "no dtype": (_set(lambda said: said["tensors"]["plain"], "dtype", "f32"), ": tensor 'plain': dtype is 'f32'"),
    "the dtype of another": (
        _set(lambda said: said["tensors"]["plain"], "dtype", "int32"),
        ": tensor 'plain': its codes or values are F32 of shape (3, 4); expected I32 of (3, 4)",
    ),
    "another shape": (
        _set(lambda said: said["tensors"]["own"], "shape", [4, 3]),
        ": tensor 'own': its codes or values are F8_E4M3 of shape (3, 4); expected F8_E4M3 of (4, 3)",
    ),
    "a negative shape": (_set(lambda said: said["tensors"]["own"], "shape", [-1]), "shape is [-1]; expected lengths"),
    "no shape": (_set(lambda said: said["tensors"]["own"], "shape", 12), "shape is 12; expected a list of integers"),
    "no description": (_set(lambda said: said["tensors"], "own", None), ": tensor 'own': its description is None"),
    "no name": (_renamed, ": a tensor is named ''; expected a string"),
    "two for one entry": (_another_with_the_name_of_scales, ": a tensor is named 'narrow:scales', as the scales of"),
    "an entry too many": (_unsaid, " holds 'plain', of which its metadata says nothing"),
    "no scales": (_without("own:scales"), ": tensor 'own': its scales are missing; expected an entry 'own:scales'"),
    "no codes": (_without("own"), ": tensor 'own': its codes or values are missing; expected an entry 'own'"),
    "codes as numbers": (
        _array("narrow", np.zeros((3, 4), np.float32)),
        ": tensor 'narrow': its codes or values are F32 of shape (3, 4); expected U8 of (3, 4)",
    ),
    "codes without their dtype": (
        _array("own", np.zeros((3, 4), np.uint8)),
        "its codes or values are U8 of shape (3, 4); expected F8_E4M3 of (3, 4)",
    ),
    "codes of more bits": (
        _array("blocks", np.full((3, 4), 16, np.uint8)),
        ": tensor 'blocks': a code is 16; expected at most 15, E2M1 has 4 bits",
    ),
    "a scale of zero": (
        _array("own:scales", np.zeros((), np.float32)),
        ": tensor 'own': a scale is 0.0; expected positive",
    ),
    "a scale of NaN": (_array("own:scales", np.array(np.nan, np.float32)), "a scale is nan; expected positive"),
    "a negative scale": (_array("narrow:scales", np.float32([[1, -1, 1, 1]])), "a scale is -1.0; expected positive"),
    "a subnormal scale": (_array("own:scales", np.array(1e-40, np.float32)), "expected positive float32 from 2^-126"),
    "a block without a scale": (
        _array("blocks:scales", np.full((3, 2), 255, np.uint8).view(ml_dtypes.float8_e8m0fnu)),
        ": tensor 'blocks': a scale is NaN, the E8M0 code 255; expected that with scale='mx' or 'fit' only",
    ),
    "the smallest scale of E8M0": (
        _array("blocks:scales", np.zeros((3, 2), np.uint8).view(ml_dtypes.float8_e8m0fnu)),
        "a scale is the E8M0 code 0, worth 2^-127; expected codes from 1 on",
    ),
}


def test_the_sound_file_is_read(sound, tmp_path: Path) -> None:
    """What the damage is done to, lest something else be refused."""
    said, arrays = sound
    save_file(arrays, tmp_path / "file", {"altgrad": json.dumps(said)})
    assert set(altgrad_jax.load_packed(tmp_path / "file").tensors) == set(said["tensors"])
    assert set(altgrad_torch.load_packed(tmp_path / "file").tensors) == set(said["tensors"])


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(sound, tmp_path: Path, damage: str) -> None:
    said, arrays = json.loads(json.dumps(sound[0])), dict(sound[1])
    change, message = DAMAGE[damage]
    change(said, arrays)
    save_file(arrays, tmp_path / "file", {"altgrad": json.dumps(said)})
    assert message in _refused(tmp_path / "file")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, " holds no packed tensors: its metadata has no 'altgrad'"),
        ({"format": "pt"}, " holds no packed tensors"),
        ({"altgrad": "{"}, ": the metadata 'altgrad' is no JSON"),
        ({"altgrad": "[" * 100_000}, ": the metadata 'altgrad' is no JSON"),
        ({"altgrad": "7"}, ": the metadata is 7; expected an object"),
        ({"altgrad": '{"version": 1, "version": 1}'}, ": the metadata names something twice among version, version"),
        ({"altgrad": "{}"}, ": the version is None; this AltGrad reads version 1"),
    ],
)
def test_other_safetensors_files(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "file", metadata)
    assert message in _refused(tmp_path / "file")


def test_parts_of_files(sound, tmp_path: Path) -> None:
    said, arrays = sound
    save_file(arrays, tmp_path / "whole", {"altgrad": json.dumps(said)})
    whole = (tmp_path / "whole").read_bytes()
    for kept in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "part").write_bytes(whole[:kept])
        assert " is no whole safetensors file (" in _refused(tmp_path / "part")
    (tmp_path / "more").write_bytes(whole + b"!")
    assert " is no whole safetensors file (" in _refused(tmp_path / "more")
    (tmp_path / "other").write_bytes(b"PK\x03\x04" + bytes(100))
    assert " is no whole safetensors file (" in _refused(tmp_path / "other")


@pytest.mark.parametrize("load", [altgrad_jax.load_packed, altgrad_torch.load_packed])
def test_what_is_no_file(load: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        load(tmp_path)
