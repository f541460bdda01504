"""Packing in JAX: sizes, shapes, sharding, transformations, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from altgrad_core.errors import InputError
from altgrad_core.formats import Format
from altgrad_core.packing import STORED_AS
from altgrad_jax import (
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

X = jnp.asarray(np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32))


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


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
    assert packed.nbytes == packed.layout.nbytes(X.shape) == expected
    save_packed(tmp_path / "file", {"x": packed})
    header = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert os.path.getsize(tmp_path / "file") == 8 + header + expected


def test_a_model_is_four_times_smaller(tmp_path: Path) -> None:
    weights = {f"blocks/{k}/{part}": jnp.ones((64, 64)) for k in range(4) for part in ("attn", "mlp")}
    weights |= {f"{name}_bias": jnp.ones(64) for name in weights}
    packed = pack_tensors(weights, {".*_bias": None, ".*": PackRule("E4M3")})
    save_packed(tmp_path / "packed", packed)
    save_packed(tmp_path / "whole", weights)
    arrays = [sum(x.nbytes for x in tensors.values()) for tensors in (packed, weights)]
    assert arrays == [8 * (64 * 64 + 4 + 64 * 4), 8 * (64 * 64 * 4 + 64 * 4)]
    assert os.path.getsize(tmp_path / "packed") < 0.30 * os.path.getsize(tmp_path / "whole")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 5)])
def test_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = jnp.full(shape, -1.1)
    packed = {"tensor": pack_tensor(x, "E2M5")}
    if shape:
        packed["channel"] = pack_tensor(x, "E2M5", scale="ratio", granularity="channel")
        packed["block"] = pack_tensor(x, "E2M5", granularity="block2")
    save_packed(tmp_path / "file", packed)
    loaded = load_packed(tmp_path / "file").tensors
    for name, found in unpack_tensors(loaded).items():
        assert found.shape == shape
        assert loaded[name].scales.shape == packed[name].scales.shape
        assert np.array_equal(bits(found), bits(unpack_tensor(packed[name])))


def test_scales_that_are_given() -> None:
    """As ``quantize`` takes them, of the shape of ``amaxes``; in blocks they are kept as E8M0 where they can be."""
    for share, kept in ((PerChannel(0), np.float32), ("block32", np.uint8)):
        scale = np.exp2(np.round(np.log2(np.asarray(amaxes(X, share)))) - 6)
        packed = pack_tensor(X, "E4M3", scale=scale, granularity=share, rounding="toward_zero", overflow="saturate")
        assert packed.layout.scale_kind == "power_of_two"
        assert packed.scales.dtype == kept
        spread = np.repeat(scale, 32, axis=-1) if share == "block32" else scale
        expected = quantize(X, "E4M3", scale=spread, rounding="toward_zero", overflow="saturate")
        assert np.array_equal(bits(unpack_tensor(packed)), bits(expected))
    assert pack_tensor(X, "E4M3", scale=0.3, granularity="block32").scales.dtype == jnp.float32
    assert pack_tensor(X, "E4M3", scale=jnp.full((1, 1), 0.3)).scales.shape == ()


def test_stochastic_rounding_is_packed_as_it_fell() -> None:
    drawn = jax.random.bits(jax.random.key(0), X.shape)
    scale = jnp.float32(2.0**-4)
    rounded = quantize(X, "E4M3", scale=scale, rounding="stochastic", random_bits=drawn)
    assert np.array_equal(bits(unpack_tensor(pack_tensor(rounded, "E4M3", scale=scale))), bits(rounded))
    with pytest.raises(InputError, match="quantize with them, then encode"):
        pack_tensor(X, "E4M3", rounding="stochastic")


def test_x64_changes_nothing() -> None:
    before = pack_tensor(X, "E6M1", scale="ratio", granularity="channel")
    with jax.enable_x64(True):
        after = pack_tensor(X, "E6M1", scale="ratio", granularity="channel")
        assert after.layout == before.layout
        assert unpack_tensor(after).dtype == jnp.float32
        assert np.array_equal(bits(unpack_tensor(after)), bits(unpack_tensor(before)))
    assert np.array_equal(np.asarray(after.codes), np.asarray(before.codes))
    assert np.array_equal(np.asarray(after.scales), np.asarray(before.scales))


def test_float64_needs_x64(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        x = jnp.array([1.0, 1 / 3])
        packed = pack_tensor(x, "E4M3")
        save_packed(tmp_path / "packed", {"x": packed})
        save_packed(tmp_path / "plain", {"x": x, "k": jnp.arange(2)})
        loaded = load_packed(tmp_path / "plain").tensors
        assert (loaded["x"].dtype, loaded["k"].dtype) == (jnp.float64, jnp.int64)
        assert unpack_tensor(load_packed(tmp_path / "packed").tensors["x"]).dtype == jnp.float64
    with pytest.raises(InputError, match=r"plain: tensor 'k': what was saved is int64, which JAX has with jax\.enable"):
        load_packed(tmp_path / "plain")
    with pytest.raises(InputError, match="what was packed is float64"):
        unpack_tensor(load_packed(tmp_path / "packed").tensors["x"])


def test_packed_tensors_are_pytrees() -> None:
    """Formats of one width share the compiled program; layouts that differ otherwise are other structures."""

    @jax.jit
    @chex.assert_max_traces(n=2)
    def sum_of(packed: PackedTensor) -> jax.Array:
        return unpack_tensor(packed).sum()

    for name in ("E4M3", "E3M4"):
        packed = pack_tensor(X, name)
        assert np.isclose(sum_of(packed), unpack_tensor(packed).sum(), rtol=1e-4, atol=0)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *(pack_tensor(k * X, "E4M3") for k in (1, 2)))
    both = jax.vmap(unpack_tensor)(stacked)
    assert np.array_equal(bits(both[1]), bits(unpack_tensor(pack_tensor(2 * X, "E4M3"))))
    assert [str(path[0]) for path, _ in jax.tree.leaves_with_path(stacked)] == [".codes", ".scales"]


def test_sharded_arrays(tmp_path: Path) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    packed = pack_tensor(jax.device_put(X, sharding), "E4M3", granularity="channel")
    assert packed.codes.sharding.is_equivalent_to(sharding, 2)
    save_packed(tmp_path / "file", {"x": packed})
    loaded = load_packed(tmp_path / "file").tensors["x"]
    assert np.array_equal(np.asarray(loaded.codes), np.asarray(pack_tensor(X, "E4M3", granularity="channel").codes))


def test_arrays_in_any_order_of_memory(tmp_path: Path) -> None:
    """safetensors writes memory as it lies: a transposed NumPy array would come back scrambled."""
    x = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    save_packed(tmp_path / "file", {"x": x, "last": x[:, ::-1]})
    loaded = load_packed(tmp_path / "file").tensors
    assert loaded["x"].tolist() == x.tolist()
    assert loaded["last"].tolist() == x[:, ::-1].tolist()


def test_nan_is_never_lost() -> None:
    x = X.at[0, :2].set(jnp.nan).at[1, 0].set(jnp.inf)
    message = "2 of 6144 elements are NaN, for which E3M4 has no code"
    with pytest.raises(InputError, match=message):
        pack_tensor(x, "E3M4")
    with pytest.raises(InputError, match=f"tensor 'w': {message}"):
        pack_tensors({"w": x}, {"w": PackRule("E3M4", granularity="channel")})
    with pytest.raises(InputError, match="1 of 6144 elements are infinite, for which E4M3 has no code"):
        pack_tensor(x, "E4M3", overflow="saturate_finite")
    assert jnp.isnan(unpack_tensor(pack_tensor(x, "E4M3"))).sum() == 3  # inf is NaN there: the native overflow
    kept = unpack_tensor(pack_tensor(x, "E5M2", overflow="saturate_finite"))
    assert (jnp.isnan(kept).sum(), jnp.isinf(kept).sum()) == (2, 1)
    blocks = unpack_tensor(pack_tensor(x, "E3M4", scale="mx", granularity="block32"))
    assert jnp.isnan(blocks).sum() == 64  # MX: all of a block


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "e4m3"}, "did you mean E4M3"),
        ({"format": "float8_e8m0fnu"}, "no sign and no zero: it is for scales"),
        ({"format": "float32"}, "float32 has 32 bits; codes are made for formats of at most 16"),
        ({"format": Format("tiny", 1, 0, 0)}, "'tiny' has 2 bits, which no name means; expected 3 to 16"),
        ({"scale": "pow2"}, "unknown kind of scale 'pow2'; Expected one of power_of_two, ratio, mx, fit"),
        ({"scale": "mx"}, "scale='mx' is a rule for blocks; expected a granularity such as 'block32'"),
        (
            {"scale": "fit", "granularity": "block32", "overflow": "saturate"},
            "overflow='saturate' would have no effect",
        ),
        ({"granularity": "row"}, "unknown granularity 'row'"),
        ({"granularity": PerChannel(2)}, "axis 2 is out of range"),
        ({"granularity": PerBlock(4, 5)}, "axis 5 is out of range"),
        ({"rounding": "up"}, "unknown rounding 'up'"),
        ({"overflow": "wrap"}, "unknown overflow policy 'wrap'"),
        ({"scale": 0.0}, r"a scale is 0\.0; expected positive float32 from 2\^-126 on"),
        ({"scale": -1.0}, r"a scale is -1\.0"),
        ({"scale": np.inf}, "a scale is inf"),
        ({"scale": np.nan}, "a scale is nan"),
        ({"scale": jnp.ones(96), "granularity": "channel"}, r"shape \(96,\); expected \(1, 96\)"),
        ({"scale": jnp.ones((64, 96))}, r"shape \(64, 96\); expected \(\) for PerTensor"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack_tensor(X, **({"format": "E4M3"} | options))


def test_refused_kinds_of_arrays() -> None:
    with pytest.raises(TypeError, match="pack_tensor takes floating-point arrays; got int32"):
        pack_tensor(jnp.arange(3), "E4M3")
    with pytest.raises(TypeError, match="tensor 'steps': pack_tensor takes floating-point arrays"):
        pack_tensors({"steps": jnp.arange(3)}, {".*": PackRule("E4M3")})
    with pytest.raises(InputError, match="traced here"):
        jax.jit(lambda x: pack_tensor(x, "E4M3").codes)(X)
    with pytest.raises(InputError, match="no rule matches 'bias'"):
        pack_tensors({"bias": X}, {"kernel": PackRule("E4M3")})


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        ({"x": jnp.zeros(2, jnp.int4)}, {}, InputError, "tensor 'x' has dtype int4; expected one of float64"),
        ({"x": jnp.zeros(2, jnp.float8_e3m4)}, {}, InputError, "tensor 'x' has dtype float8_e3m4"),
        ({"x": jax.random.key(0)}, {}, InputError, "tensor 'x' has dtype key<fry>"),
        ({"x": [1.0]}, {}, TypeError, "tensor 'x' is a list; expected an array or a PackedTensor"),
        ({"": X}, {}, InputError, "a tensor is named ''"),
        ({"__metadata__": X}, {}, InputError, "a tensor is named '__metadata__'"),
        ({3: X}, {}, InputError, "a tensor is named 3; expected a string"),
        ({"x": X}, {"step": 3}, InputError, "the metadata has 'step': 3; expected strings"),
    ],
)
def test_refused_in_files(tmp_path: Path, tensors, metadata, error: type[Exception], message: str) -> None:
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(error, match=message):
        save_packed(tmp_path / "file", tensors, metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_refused_parts(tmp_path: Path) -> None:
    good = pack_tensor(X, "E4M3", granularity="channel")
    with pytest.raises(InputError, match="a tensor is named 'x:scales', as the scales of 'x' would be"):
        save_packed(tmp_path / "file", {"x": good, "x:scales": X})
    for bad, message in (
        (PackedTensor(good.codes.astype(jnp.uint16), good.scales, good.layout), "its codes are uint16; expected uint8"),
        (PackedTensor(good.codes, good.scales[0], good.layout), r"its scales are float32 of shape \(96,\); expected"),
        (PackedTensor(good.codes, -good.scales, good.layout), "a scale is -"),
    ):
        with pytest.raises(InputError, match=f"tensor 'x': {message}"):
            save_packed(tmp_path / "file", {"x": bad})
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_packed(tmp_path / "nowhere" / "file", {"x": good})


def test_a_file_replaces_another_and_is_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    for k in (1, 2):
        save_packed(tmp_path / "file", {"x": k * X})
    assert np.array_equal(load_packed(tmp_path / "file").tensors["x"], 2 * X)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new"]


def test_every_dtype_is_kept_as_it_is(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        tensors = {name: jnp.asarray(np.array([0, 1, 1]), jnp.dtype(name)) for name in STORED_AS}
        tensors["float8_e8m0fnu"] = jnp.asarray([1, 2, 4], jnp.float8_e8m0fnu)
        save_packed(tmp_path / "file", tensors)
        for name, found in load_packed(tmp_path / "file").tensors.items():
            assert str(found.dtype) == name
            assert np.asarray(found).tobytes() == np.asarray(tensors[name]).tobytes()
