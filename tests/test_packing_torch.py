"""Packing in torch: sizes, shapes, memory layout, gradients, tied weights, and what is refused."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from altgrad_core.errors import InputError
from altgrad_core.packing import STORED_AS
from altgrad_torch import (
    PackedTensor,
    PackRule,
    PerBlock,
    PerChannel,
    amaxes,
    load_packed,
    pack_tensor,
    pack_tensors,
    quantize,
    save_packed,
    unpack_tensor,
    unpack_tensors,
)

X = torch.randn((64, 96), generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(torch.get_default_device())


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize(
    ("name", "granularity", "scale", "expected"),
    [
        ("E3M4", "tensor", "power_of_two", 6144 + 4),
        ("E3M4", "channel", "ratio", 6144 + 4 * 96),
        ("E3M4", "block32", "power_of_two", 6144 + 192),
        ("E4M3", "block32", "mx", 6144 + 192),
        ("E3M4", "block32", "ratio", 6144 + 4 * 192),
        ("E2M1", "tensor", "power_of_two", 6144 + 4),  # a byte for each code of four bits
        ("E5M6", "tensor", "power_of_two", 2 * 6144 + 4),
    ],
)
def test_bytes(tmp_path: Path, name: str, granularity: str, scale, expected: int) -> None:
    packed = pack_tensor(X, name, granularity=granularity, scale=scale)
    assert packed.nbytes == packed.layout.nbytes(tuple(X.shape)) == expected
    save_packed(tmp_path / "file", {"x": packed})
    header = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert os.path.getsize(tmp_path / "file") == 8 + header + expected


def test_a_module_goes_and_comes_back(tmp_path: Path) -> None:
    """The state of a module with tied weights, as ``state_dict`` gives it; a module takes what is unpacked."""
    module = torch.nn.Sequential(torch.nn.Embedding(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
    module[2].weight = module[0].weight
    state = module.state_dict()
    packed = pack_tensors(state, {r"[02]\.weight": PackRule("E4M3", granularity=PerChannel(0)), ".*": None})
    save_packed(tmp_path / "packed", packed)
    save_packed(tmp_path / "whole", state)
    loaded = load_packed(tmp_path / "packed").tensors
    values = unpack_tensors(loaded)
    assert list(values) == sorted(state)
    expected = quantize(state["2.weight"], "E4M3", scale=packed["2.weight"].scales)
    assert same_bits(values["0.weight"], expected)
    assert same_bits(load_packed(tmp_path / "whole").tensors["2.weight"], state["0.weight"])
    module.load_state_dict(values)
    assert same_bits(module[2].weight, expected)
    assert packed["2.weight"].nbytes == 64 * 64 + 4 * 64
    assert os.path.getsize(tmp_path / "packed") < 0.40 * os.path.getsize(tmp_path / "whole")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 5)])
@pytest.mark.parametrize("scale", ["power_of_two", "ratio"])
def test_shapes(tmp_path: Path, shape: tuple[int, ...], scale) -> None:
    x = torch.full(shape, -1.1)
    packed = {"tensor": pack_tensor(x, "E2M5", scale=scale)}
    if shape:
        packed["channel"] = pack_tensor(x, "E2M5", scale=scale, granularity="channel")
        packed["block"] = pack_tensor(x, "E2M5", scale=scale, granularity="block2")
    save_packed(tmp_path / "file", packed)
    loaded = load_packed(tmp_path / "file").tensors
    for name, found in unpack_tensors(loaded).items():
        assert tuple(found.shape) == shape
        assert loaded[name].scales.shape == packed[name].scales.shape
        assert same_bits(found, unpack_tensor(packed[name]))


@pytest.mark.parametrize("name", ["E4M3", "E8M7b140"])
@pytest.mark.parametrize("share", ["tensor", "channel", "block32", PerBlock(5, 0)])
def test_memory_layout_does_not_matter(tmp_path: Path, name: str, share) -> None:
    for x in (X.T, X[::2, 1::3], X.reshape(4, 16, 96).permute(2, 0, 1), X[:1].expand(7, 96)):
        packed = pack_tensor(x, name, granularity=share)
        whole = pack_tensor(x.clone(memory_format=torch.contiguous_format), name, granularity=share)
        assert packed.codes.is_contiguous()
        assert torch.equal(packed.codes, whole.codes)
        assert torch.equal(packed.scales, whole.scales)
        scattered = PackedTensor(packed.codes.mT.contiguous().mT, packed.scales, packed.layout)
        save_packed(tmp_path / "file", {"x": scattered, "plain": x})
        loaded = load_packed(tmp_path / "file").tensors
        assert same_bits(unpack_tensor(loaded["x"]), unpack_tensor(packed))
        assert same_bits(loaded["plain"], x.contiguous())


def test_gradients_are_left_behind(tmp_path: Path) -> None:
    x = X.clone().requires_grad_()
    packed = pack_tensor(x * 2, "E3M4", scale=(x[0, 0] * 0 + 0.5))
    save_packed(tmp_path / "file", {"packed": packed, "plain": x})
    assert not any(part.requires_grad for part in (packed.codes, packed.scales, unpack_tensor(packed)))
    assert not load_packed(tmp_path / "file").tensors["plain"].requires_grad


def test_scales_that_are_given() -> None:
    for share, kept in (("channel", torch.float32), (PerChannel(0), torch.float32), ("block32", torch.uint8)):
        scale = torch.exp2(torch.round(torch.log2(amaxes(X, share))) - 6)
        packed = pack_tensor(X, "E4M3", scale=scale, granularity=share, rounding="toward_zero", overflow="saturate")
        assert packed.layout.scale_kind == "power_of_two"
        assert packed.scales.dtype == kept
        spread = scale.repeat_interleave(32, -1) if share == "block32" else scale
        expected = quantize(X, "E4M3", scale=spread, rounding="toward_zero", overflow="saturate")
        assert same_bits(unpack_tensor(packed), expected)
    assert pack_tensor(X, "E4M3", scale=0.3, granularity="block32").scales.dtype == torch.float32
    assert pack_tensor(X, "E4M3", scale=torch.full((1, 1), 0.3)).scales.shape == ()
    given = torch.ones(1, 96)
    kept = pack_tensor(X, "E4M3", scale=given, granularity="channel").scales
    given.zero_()
    assert bool((kept == 1).all())  # a copy


def test_nan_is_never_lost() -> None:
    x = X.clone()
    x[0, :2], x[1, 0] = torch.nan, torch.inf
    message = "2 of 6144 elements are NaN, for which E3M4 has no code"
    with pytest.raises(InputError, match=message):
        pack_tensor(x, "E3M4")
    with pytest.raises(InputError, match=f"tensor 'w': {message}"):
        pack_tensors({"w": x}, {"w": PackRule("E3M4", granularity="channel")})
    with pytest.raises(InputError, match="1 of 6144 elements are infinite, for which E4M3 has no code"):
        pack_tensor(x, "E4M3", overflow="saturate_finite")
    assert unpack_tensor(pack_tensor(x, "E4M3")).isnan().sum() == 3  # inf is NaN there: the native overflow
    kept = unpack_tensor(pack_tensor(x, "E5M2", overflow="saturate_finite"))
    assert (kept.isnan().sum(), kept.isinf().sum()) == (2, 1)
    assert unpack_tensor(pack_tensor(x, "E3M4", scale="mx", granularity="block32")).isnan().sum() == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "e4m3"}, "did you mean E4M3"),
        ({"format": "float8_e8m0fnu"}, "no sign and no zero: it is for scales"),
        ({"format": "float32"}, "float32 has 32 bits; codes are made for formats of at most 16"),
        ({"scale": "pow2"}, "unknown kind of scale 'pow2'"),
        ({"scale": "mx"}, "scale='mx' is a rule for blocks; expected a granularity such as 'block32'"),
        (
            {"scale": "fit", "granularity": "block32", "overflow": "saturate"},
            "overflow='saturate' would have no effect",
        ),
        ({"scale": "fit", "granularity": "block32", "rounding": "up"}, "unknown rounding 'up'"),
        ({"granularity": "row"}, "unknown granularity 'row'"),
        ({"granularity": PerChannel(2)}, "axis 2 is out of range"),
        ({"rounding": "stochastic"}, "quantize with them, then encode"),
        ({"overflow": "wrap"}, "unknown overflow policy 'wrap'"),
        ({"scale": 0.0}, r"a scale is 0\.0; expected positive float32 from 2\^-126 on"),
        ({"scale": torch.tensor(-1.0)}, r"a scale is -1\.0"),
        ({"scale": torch.nan}, "a scale is nan"),
        ({"scale": torch.ones(96), "granularity": "channel"}, r"shape \(96,\); expected \(1, 96\)"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack_tensor(X, **({"format": "E4M3"} | options))


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        (
            {"x": torch.zeros(2, dtype=torch.complex128)},
            {},
            InputError,
            "tensor 'x' has dtype complex128; expected one",
        ),
        (
            {"x": torch.eye(2).to_sparse()},
            {},
            InputError,
            r"tensor 'x' is sparse \(torch.sparse_coo\); expected a dense",
        ),
        ({"x": [1.0]}, {}, TypeError, "tensor 'x' is a list; expected a tensor or a PackedTensor"),
        ({"__metadata__": X}, {}, InputError, "a tensor is named '__metadata__'"),
        ({"x": X}, {"step": 3}, InputError, "the metadata has 'step': 3; expected strings"),
        ({"x": pack_tensor(X, "E4M3"), "x:scales": X}, {}, InputError, "'x:scales', as the scales of 'x' would be"),
        (
            {"x": PackedTensor(X, torch.tensor(1.0), pack_tensor(X, "E4M3").layout)},
            {},
            InputError,
            "tensor 'x': its codes are float32; expected uint8 for E4M3",
        ),
    ],
)
def test_refused_in_files(tmp_path: Path, tensors, metadata, error: type[Exception], message: str) -> None:
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(error, match=message):
        save_packed(tmp_path / "file", tensors, metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


@pytest.fixture
def _full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("_full_disk")
def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    save_packed(tmp_path / "file", {"x": X[0, :4]})
    with pytest.raises(OSError, match=r"file could not be written: .*File too large"):
        save_packed(tmp_path / "file", {"x": X})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert same_bits(load_packed(tmp_path / "file").tensors["x"], X[0, :4])


def test_a_loaded_tensor_outlives_its_file(tmp_path: Path) -> None:
    """It may be mapped into memory: what is written under the name afterwards is another file."""
    save_packed(tmp_path / "file", {"x": X})
    loaded = load_packed(tmp_path / "file").tensors["x"]
    save_packed(tmp_path / "file", {"x": X[0]})
    (tmp_path / "file").unlink()
    assert same_bits(loaded.to(X.device), X)
    loaded += 1


def test_every_dtype_is_kept_as_it_is(tmp_path: Path) -> None:
    tensors = {name: torch.tensor([1, 2, 4]).to(getattr(torch, name)) for name in STORED_AS}
    save_packed(tmp_path / "file", tensors)
    for name, found in load_packed(tmp_path / "file").tensors.items():
        assert str(found.dtype) == f"torch.{name}"
        assert torch.equal(found.view(torch.uint8), tensors[name].cpu().view(torch.uint8))
