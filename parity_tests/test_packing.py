"""Packed tensors: both packages make the same codes, scales and files of the same values, and the same values again."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import altgrad_jax
import altgrad_torch
from altgrad_core.formats import EIGHT, FORMAT_REGISTRY, parse
from altgrad_core.packing import SCALE_KINDS, STORED_AS
from altgrad_core.scaling import BLOCK_RULES, Granularity, PerBlock, PerChannel, PerTensor
from altgrad_jax.params import FormatParams
from parity_tests.support import TORCH_DEVICE, assert_same_bits, bits_of, boundaries, padded, to_torch

# Formats by name, without those that equal an earlier one.
FORMATS = list(
    {known: name for name, known in reversed(FORMAT_REGISTRY.items()) if known.is_signed and known.bits <= 16}.values()
)
GRANULARITIES = {
    "tensor": PerTensor(),
    "channel": PerChannel(),
    "two axes": PerChannel((0, -1)),
    "block32": PerBlock(),
    "block3": PerBlock(3, 0),
}


@partial(jax.jit, static_argnums=(2, 3))
def quantized_jax(x: jax.Array, params: FormatParams, share: Granularity, kind: str) -> jax.Array:
    """What unpacking has to give, by what has nothing to do with codes."""
    if kind in BLOCK_RULES:
        return altgrad_jax.quantize_blocks(x, params, block=share.size, axis=share.axis, rule=kind)
    scaling = altgrad_jax.Current(power_of_two=kind == "power_of_two")
    scale = scaling.scale(altgrad_jax.amaxes(x, share), params.max_value)
    return altgrad_jax.quantize(x, params, scale=altgrad_jax.spread(scale, x.shape, share))


def quantized_torch(x: torch.Tensor, name: str, share: Granularity, kind: str) -> torch.Tensor:
    if kind in BLOCK_RULES:
        return altgrad_torch.quantize_blocks(x, name, block=share.size, axis=share.axis, rule=kind)
    scaling = altgrad_torch.Current(power_of_two=kind == "power_of_two")
    scale = scaling.scale(altgrad_torch.amaxes(x, share), parse(name).max_representable_value)
    return altgrad_torch.quantize(x, name, scale=altgrad_torch.spread(scale, tuple(x.shape), share))


def without_sign_of_nan(x):
    """Codes hold no sign of NaN."""
    bits = bits_of(x)
    return np.where(np.isnan(np.asarray(x, np.float64)), bits & ((1 << (8 * bits.dtype.itemsize - 1)) - 1), bits)


def drawn(shape=(5, 70), seed=0):
    """Normal numbers over 30 binades, with zeros of both signs and a subnormal."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * 2.0 ** rng.integers(-15, 15, shape)).astype(np.float32)
    x.reshape(-1)[:4] = 0.0, -0.0, 1e-40, -3e-39
    return x


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_and_its_neighbours_come_back(name: str) -> None:
    """Under no scale, one scale, and scales that change between elements; NaN and infinities where there are codes."""
    x = boundaries(parse(name))
    x = x if parse(name).has_nan else x[~np.isnan(x)]
    x = padded(x, 1 << (12 if parse(name).bits <= 8 else 19))
    for scale in (1.0, 2.0**-3, 3.0):
        packed = altgrad_jax.pack_tensor(jnp.asarray(x), name, scale=scale)
        other = altgrad_torch.pack_tensor(to_torch(x), name, scale=scale)
        assert packed.layout == other.layout
        assert packed.layout.scale_kind == ("ratio" if scale == 3.0 else "power_of_two")
        assert_same_bits(packed.codes, other.codes, x, "codes")
        back, also = altgrad_jax.unpack_tensor(packed), altgrad_torch.unpack_tensor(other)
        assert_same_bits(back, also, x, "unpacked")
        assert_same_bits(
            without_sign_of_nan(back),
            without_sign_of_nan(np.asarray(altgrad_jax.quantize(jnp.asarray(x), name, scale=scale))),
            x,
            f"JAX, scale {scale}",
        )
        assert_same_bits(
            without_sign_of_nan(also.cpu().numpy()),
            without_sign_of_nan(altgrad_torch.quantize(to_torch(x), name, scale=scale).cpu().numpy()),
            x,
            f"torch, scale {scale}",
        )


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_kept(name: str) -> None:
    """What codes mean is packed into the same codes again, but for the spellings of NaN."""
    known = parse(name)
    codes = np.arange(1 << known.bits, dtype=np.uint8 if known.bits <= 8 else np.uint16)
    values = np.array(altgrad_jax.decode(jnp.asarray(codes), name))
    kept = altgrad_jax.pack_tensor(jnp.asarray(values), name, scale=1.0).codes
    flushed = (np.abs(known.code_book()) < 2.0**-126) & (known.code_book() != 0)
    ordinary = ~np.isnan(known.code_book()) & ~flushed
    assert np.array_equal(np.asarray(kept)[ordinary], codes[ordinary])
    assert (np.asarray(kept)[np.isnan(known.code_book())] == known.nan_code).all()
    assert_same_bits(altgrad_torch.pack_tensor(to_torch(values), name, scale=1.0).codes, kept)


HOW = [(share, kind) for kind in SCALE_KINDS for share in GRANULARITIES if kind not in BLOCK_RULES or "block" in share]


@pytest.mark.parametrize(
    ("granularity", "kind", "name"),
    [
        pytest.param(share, kind, name, marks=() if (place + k) % 3 == 0 else pytest.mark.exhaustive)
        for place, (share, kind) in enumerate(HOW)
        for k, name in enumerate(EIGHT)
    ],
)
def test_scales_by_amax(granularity: str, kind, name: str) -> None:
    x, share = drawn(), GRANULARITIES[granularity]
    packed = altgrad_jax.pack_tensor(jnp.asarray(x), name, scale=kind, granularity=share)
    other = altgrad_torch.pack_tensor(to_torch(x), name, scale=kind, granularity=share)
    assert packed.layout == other.layout
    assert_same_bits(packed.codes, other.codes)
    assert_same_bits(packed.scales, other.scales)
    assert packed.nbytes == other.nbytes == packed.layout.nbytes(x.shape)
    back, also = altgrad_jax.unpack_tensor(packed), altgrad_torch.unpack_tensor(other)
    assert_same_bits(back, also)
    assert_same_bits(back, quantized_jax(jnp.asarray(x), FormatParams.from_format(name), share, kind))
    assert_same_bits(also, quantized_torch(to_torch(x), name, share, kind))


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        pytest.param(name, kind, dtype, marks=() if (place + k) % 2 == 0 else pytest.mark.exhaustive)
        for place, (name, kind) in enumerate(
            [("E4M3", "power_of_two"), ("E7M0", "ratio"), ("E4M3", "mx"), ("E8M7b140", "power_of_two")]
        )
        for k, dtype in enumerate(["bfloat16", "float16", "float64"])
    ],
)
def test_dtypes_are_restored(name: str, kind, dtype: str) -> None:
    share = PerBlock(7, 0)
    with jax.enable_x64(dtype == "float64"), np.errstate(over="ignore"):
        x = drawn().astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        if dtype == "float64":
            x = x * (1 + 2.0**-30)  # no float32
        given, tensor = jnp.asarray(x), to_torch(x)
        packed = altgrad_jax.pack_tensor(given, name, scale=kind, granularity=share)
        other = altgrad_torch.pack_tensor(tensor, name, scale=kind, granularity=share)
        assert_same_bits(packed.codes, other.codes)
        assert_same_bits(packed.scales, other.scales)
        back, also = altgrad_jax.unpack_tensor(packed), altgrad_torch.unpack_tensor(other)
        assert str(back.dtype) == dtype
        assert_same_bits(back, also)
        assert_same_bits(back, quantized_jax(given, FormatParams.from_format(name), share, kind))
        assert_same_bits(also, quantized_torch(tensor, name, share, kind))


def everything() -> tuple[dict[str, np.ndarray], dict[str, altgrad_jax.PackRule | None]]:
    """A model's worth of tensors, and a rule for each of the eight formats and three granularities."""
    tensors, rules = {}, {}
    for name in EIGHT:
        for granularity in ("tensor", "channel", "block32"):
            tensors[f"blocks/{name}/{granularity}"] = drawn((6, 40), seed=len(tensors))
            rules[f"blocks/{name}/{granularity}"] = altgrad_jax.PackRule(name, granularity=granularity)
    rng = np.random.default_rng(1)
    tensors |= {
        "h.0.mx": drawn((6, 40)),
        "h.0.ratio": drawn((4, 3, 2)),
        "h.0.four bits": drawn((6, 40)),
        "h.0.twelve bits": drawn((6, 40)),
        "h.0.half": rng.normal(size=(3, 5)).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
        "nothing": np.zeros((0, 4), np.float32),
        'naïve\n"name"': drawn((4, 1)),
        "bias": rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "steps": np.arange(5, dtype=np.int32),
        "mask": np.array([True, False]),
        "eight": np.linspace(-1, 1, 9).astype(ml_dtypes.float8_e5m2),
    }
    rules |= {
        "h.0.mx": altgrad_jax.PackRule("E2M1", "mx", "block32"),
        "h.0.ratio": altgrad_jax.PackRule("binary8p3se", "ratio", PerChannel((0, 2))),
        "h.0.four bits": altgrad_jax.PackRule("float4_e2m1fn", granularity=PerBlock(16, 0)),
        "h.0.twelve bits": altgrad_jax.PackRule("E5M6b3ieee"),
        "h.0.half": altgrad_jax.PackRule("bf16", "ratio", "channel"),
        "scalar|nothing|naïve.*": altgrad_jax.PackRule("float8_e5m2fnuz"),
        "[\\s\\S]*": None,
    }
    return tensors, {
        pattern.replace(".", r"\.") if pattern.startswith("h") else pattern: r for pattern, r in rules.items()
    }


def torch_of(x: np.ndarray) -> torch.Tensor:
    if x.dtype == ml_dtypes.float8_e5m2:
        return torch.from_numpy(x.view(np.uint8)).view(torch.float8_e5m2).to(TORCH_DEVICE)
    return to_torch(x)


def stored_bits(x) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.cpu().contiguous()
        return (x.view(torch.uint8) if x.ndim else x.reshape(1).view(torch.uint8)).numpy()
    x = np.asarray(x)
    return np.ascontiguousarray(x).reshape(x.shape or (1,)).view(np.uint8)


def test_each_reads_what_the_other_wrote(tmp_path: Path) -> None:
    tensors, rules = everything()
    mine = altgrad_jax.pack_tensors({name: jnp.asarray(x) for name, x in tensors.items()}, rules)
    yours = altgrad_torch.pack_tensors({name: torch_of(x) for name, x in tensors.items()}, rules)
    said = {"step": "12", "note": "naïve"}
    altgrad_jax.save_packed(tmp_path / "jax", mine, said)
    altgrad_torch.save_packed(tmp_path / "torch", yours, said)
    assert (tmp_path / "jax").read_bytes() == (tmp_path / "torch").read_bytes()
    for loaded in (altgrad_torch.load_packed(tmp_path / "jax"), altgrad_jax.load_packed(tmp_path / "torch")):
        assert loaded.metadata == said
        assert set(loaded.tensors) == set(tensors)
        for name, found in loaded.tensors.items():
            expected = mine[name]
            if isinstance(expected, altgrad_jax.PackedTensor):
                assert found.layout == expected.layout
                assert_same_bits(found.codes, expected.codes, what=name)
                assert_same_bits(found.scales, expected.scales, what=name)
            else:
                assert str(found.dtype).removeprefix("torch.") == str(expected.dtype)
                assert tuple(found.shape) == expected.shape
                assert np.array_equal(stored_bits(found), stored_bits(expected)), name
    values = altgrad_torch.unpack_tensors(altgrad_torch.load_packed(tmp_path / "jax").tensors)
    expected = altgrad_jax.unpack_tensors(altgrad_jax.load_packed(tmp_path / "torch").tensors)
    for name, value in values.items():
        assert np.array_equal(stored_bits(value), stored_bits(expected[name])), name


def test_what_other_programs_see(tmp_path: Path) -> None:
    """Formats that safetensors has are stored as such: any reader of safetensors sees the values without the scales."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    x = drawn((4, 32))
    names = ("E4M3", "E5M2", "binary8p4sf", "float8_e5m2fnuz", "bf16", "fp16", "E3M4", "float8_e3m4", "E2M1", "E5M5")
    packed = {name: altgrad_jax.pack_tensor(jnp.asarray(x), name, granularity="block32") for name in names}
    altgrad_jax.save_packed(tmp_path / "file", packed)
    with safe_open(tmp_path / "file", "np") as opened:
        kinds = {name: opened.get_slice(name).get_dtype() for name in names}
        assert {opened.get_slice(f"{name}:scales").get_dtype() for name in names} == {"F8_E8M0"}
    # P3109's binary8p4sf is float8_e4m3fnuz.
    assert kinds == dict(
        zip(
            names,
            ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "BF16", "F16", "U8", "U8", "U8", "U16"),
            strict=True,
        )
    )
    assert set(kinds.values()) <= set(STORED_AS.values())
    seen = load_file(tmp_path / "file")
    for name in ("E4M3", "E5M2", "bf16", "fp16"):
        scales = seen[f"{name}:scales"].to(torch.float32)
        value = seen[name].to(torch.float32) * scales
        assert_same_bits(value, altgrad_jax.unpack_tensor(packed[name]), what=name)
