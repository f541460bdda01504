"""The comparison of trees: what counts as a difference, how far apart two floats are, and what it says."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from altgrad.parity import assert_identical, compare, named_tensors
from altgrad.parity.floats import bits_of, is_float, is_infinite, is_nan, is_subnormal, ulps_between, widened
from altgrad.parity.records import Kind
from altgrad_core.errors import InputError
from altgrad_core.formats import Format

ROOT = Path(__file__).resolve().parents[1]
NARROW_NAMES = (
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
    *("float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "bfloat16"),
)
NARROW = (*(np.dtype(getattr(ml_dtypes, name)) for name in NARROW_NAMES), np.dtype(np.float16))
TORCH_FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
NAN, OTHER_NAN, NEGATIVE_NAN = (
    np.array([bits], np.uint32).view(np.float32) for bits in (0x7FC00000, 0x7FC00001, 0xFFC00000)
)


def every_value(dtype: np.dtype) -> np.ndarray:
    """Every code of a dtype, in the order of the codes."""
    width = ml_dtypes.finfo(dtype).bits
    return np.arange(2**width, dtype=np.uint8 if dtype.itemsize == 1 else np.uint16).view(dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_neighbours_are_one_step_apart(dtype: np.dtype) -> None:
    """Every code of the dtype, sorted by value: steps are what it takes to walk from one to the next."""
    codes = every_value(dtype)
    numbers = codes[~is_nan(codes)]
    ordered = numbers[np.argsort(widened(numbers), kind="stable")]
    values = widened(ordered)
    steps = ulps_between(ordered[:-1], ordered[1:])
    assert np.array_equal(steps, (values[:-1] != values[1:]).astype(np.uint64))  # 0 between -0 and 0, otherwise 1
    from_lowest = ulps_between(np.full_like(ordered, ordered[0]), ordered)
    assert np.array_equal(from_lowest, np.concatenate([[0], np.cumsum(steps)]))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_specials_and_subnormals_are_told(dtype: np.dtype) -> None:
    codes = every_value(dtype)
    known = Format.from_dtype(dtype)
    real = known.code_book()
    assert np.array_equal(is_nan(codes), np.isnan(real))
    assert np.array_equal(is_infinite(codes), np.isinf(real))
    normal = 0.0 if known.min_normal is None or not known.is_signed else known.min_normal
    assert np.array_equal(is_subnormal(codes), (np.abs(real) < normal) & (real != 0))


def place(value: float, pack: str) -> int:
    """Where a float lies on the line, by its bits in Python's integers."""
    (bits,) = struct.unpack({"f": "I", "d": "Q"}[pack], struct.pack(pack, value))
    sign = 1 << (8 * struct.calcsize(pack) - 1)
    return -(bits - sign) if bits & sign else bits


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_steps_of_float64(one: float, other: float) -> None:
    steps = int(ulps_between(np.array([one]), np.array([other]))[0])
    assert steps == abs(place(one, "d") - place(other, "d"))
    assert steps == int(ulps_between(np.array([other]), np.array([one]))[0])


@given(st.floats(allow_nan=False, width=32), st.integers(0, 40))
def test_steps_of_float32(start: float, count: int) -> None:
    end = np.float32(start)
    with np.errstate(over="ignore"):
        for _ in range(count):
            end = np.nextafter(end, np.float32(math.inf))
    found = compare(np.float32(start), end)
    taken = place(float(end), "f") - place(start, "f")
    assert (found.largest_ulps or 0) == taken
    assert compare(np.float32(start), end, tolerance_ulps=count).passed or math.isinf(start) or math.isinf(end)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), st.data())
def test_any_two_bit_patterns(bits: list[int], data: st.DataObject) -> None:
    """Identical means the same bits, and each element that differs is of one kind."""
    a = np.array(bits, np.uint32)
    b = np.array(
        [data.draw(st.sampled_from([code, code ^ 1, code ^ 0x80000000, 0x7F800000])) for code in bits], np.uint32
    )
    record = compare(a.view(np.float32), b.view(np.float32)).tensors[0]
    assert record.identical == np.array_equal(a, b)
    assert record.differing == np.count_nonzero(a != b) == sum(record.kinds.values()) == record.beyond
    if record.first is not None:
        at = int(np.flatnonzero(a != b)[0])
        assert record.first.index == (at,)
        assert record.first.bits == (f"0x{a[at]:08x}", f"0x{b[at]:08x}")
        json.dumps(record.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("a", "b", "kind", "ulps"),
    [
        (np.float32([0]), np.float32([-0.0]), "signed zero", None),
        (NAN, np.float32([1]), "nan", None),
        (NAN, np.float32([math.inf]), "nan", None),
        (NAN, OTHER_NAN, "nan payload", None),
        (NAN, NEGATIVE_NAN, "nan payload", None),
        (np.float32([math.inf]), np.float32([np.finfo(np.float32).max]), "infinity", 1),
        (np.float32([1]), np.float32([1 + 2**-22]), "value", 2),
        (np.int32([1]), np.int32([7]), "integer", None),
        (np.array([True]), np.array([False]), "integer", None),
    ],
)
def test_kinds_are_told_apart(a: np.ndarray, b: np.ndarray, kind: Kind, ulps: int | None) -> None:
    record = compare(a, b).tensors[0]
    assert (record.kinds, record.largest_ulps) == ({kind: 1}, ulps)
    assert record.first is not None
    assert (record.first.kind, record.first.ulps) == (kind, ulps)
    # No tolerance makes good what is no matter of steps, and what is ignored is not counted at all.
    assert compare(a, b, tolerance_ulps=2).passed == (kind == "value")
    assert compare(a, b, ignore=(kind,)).identical


@pytest.mark.parametrize("name", TORCH_FLOAT8)
def test_every_code_of_float8_in_both_frameworks(name: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    in_torch = torch.from_numpy(codes).view(getattr(torch, name))
    in_jax = jnp.asarray(codes.view(np.dtype(getattr(ml_dtypes, name))))
    assert compare(in_torch, in_jax).identical
    assert compare(in_torch, in_jax[::-1]).tensors[0].differing == 256


def test_every_bfloat16_in_both_frameworks() -> None:
    every = np.arange(2**16, dtype=np.uint16)
    in_torch = torch.from_numpy(every.view(np.int16)).view(torch.bfloat16)
    assert compare(in_torch, jnp.asarray(every.view(ml_dtypes.bfloat16))).identical


class Pair(NamedTuple):
    left: object
    right: object


@dataclass(frozen=True)
class Scales:
    forward: object
    none: object = None


def test_names_are_paths() -> None:
    one = np.float32(1)
    tree = {"layers": [Pair(one, torch.ones(2)), (jnp.ones(3),)], 3: Scales({"w": True}), "n": 4}
    names = ["layers.0.left", "layers.0.right", "layers.1.0", "3.forward.w", "n"]
    assert list(named_tensors(tree)) == names
    assert list(named_tensors(one)) == [""]


def test_modules_and_states_open_themselves() -> None:
    linear, layer = torch.nn.Linear(2, 3), nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert list(named_tensors(linear)) == list(named_tensors(linear.state_dict())) == ["weight", "bias"]
    assert compare(nnx.state(layer), layer).identical
    assert set(named_tensors({"fc": layer})) == {"fc.kernel", "fc.bias"}
    moments = optax.adam(1e-3).init({"w": jnp.ones(2)})
    assert list(named_tensors(moments)) == ["0.count", "0.mu.w", "0.nu.w"]
    assert named_tensors(jax.random.key(7))[""].array.dtype == np.uint32


def test_kernel_by_kernel_across_frameworks() -> None:
    weights = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    linear = torch.nn.Linear(3, 4, bias=False)
    linear.load_state_dict({"weight": torch.from_numpy(weights)})
    assert compare(linear, {"weight": jnp.asarray(weights)}, labels=("torch", "jax")).identical
    half = linear.half()
    assert compare(half, {"weight": jnp.asarray(weights, jnp.float16)}).identical


def test_missing_names_come_with_the_nearest() -> None:
    found = compare({"kernel": 1.0, "bias": 2.0}, {"kernle": 1.0, "bias": 2.0}, labels=("jax", "torch"))
    assert [(each.name, each.problem, each.nearest) for each in found.tensors] == [
        ("kernel", "missing", "kernle"),
        ("bias", None, None),
        ("kernle", "missing", "kernel"),
    ]
    assert not found.passed
    assert "kernel is missing in torch; the nearest name there is 'kernle'" in str(found)


def test_dtypes_and_shapes_have_to_match() -> None:
    assert compare(np.zeros(2), np.zeros(3)).tensors[0].problem == "shape"
    assert compare(np.zeros((2, 1)), np.zeros(2)).tensors[0].problem == "shape"
    wide, narrow = np.zeros(2, np.float32), np.zeros(2, ml_dtypes.bfloat16)
    assert compare(wide, narrow).tensors[0].problem == "dtype"
    assert compare(wide, narrow, ignore=("dtype",)).identical
    assert not compare(wide + np.float32(0.1), narrow + narrow.dtype.type(0.1), ignore=("dtype",)).identical
    assert compare(np.zeros((0, 3)), np.zeros((0, 3))).identical
    assert compare(np.int64([5]), np.uint64([5]), ignore=("dtype",)).identical
    assert compare(np.int64([-1]), np.uint64([2**64 - 1]), ignore=("dtype",)).tensors[0].problem == "dtype"


def test_tolerances_by_name() -> None:
    a = {"w": np.float32([1, 2]), "b": np.float32([1])}
    b = {"w": np.float32([1, 2 + 2**-20]), "b": np.float32([1 + 2**-23])}
    assert not compare(a, b).passed
    assert not compare(a, b, tolerance_ulps=3).passed
    assert compare(a, b, tolerance_ulps=4).passed
    assert not compare(a, b, tolerance_ulps=4).identical
    found = compare(a, b, tolerance_ulps={"w": 4})
    assert [each.passed for each in found.tensors] == [True, False]
    assert found.first_difference is not None
    assert found.first_difference.name == "b"  # w differs first, but is allowed to
    assert compare(a, b, tolerance_ulps={"w": 4, ".*": 1}).passed


def test_tolerances_of_numpy() -> None:
    a, b = np.float32([1, 2]), np.float32([1, 2 + 2**-21])
    for tolerance in (np.int64(2), {".*": np.int64(2)}):
        found = compare(a, b, tolerance_ulps=tolerance)
        assert found.passed
        json.dumps(found.as_dict())
    assert not compare(a, b, tolerance_ulps=np.int64(1)).passed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tolerance_ulps": -1}, "is -1; expected a whole number of steps"),
        ({"tolerance_ulps": None}, "is None; expected a whole number of steps"),
        ({"tolerance_ulps": 1.5}, "is 1.5; expected a whole number of steps"),
        ({"tolerance_ulps": True}, "is True; expected a whole number of steps"),
        ({"tolerance_ulps": {3: 1}}, "tolerance_ulps has 3; expected regular expressions"),
        ({"tolerance_ulps": {"w": 0.5}}, "'w' is 0.5"),
        ({"tolerance_ulps": {"wieght": 1}}, "'wieght', which matches no tensor; the nearest is 'weight'"),
        ({"tolerance_ulps": {"(": 1}}, "no regular expression"),
        ({"ignore": ("signed zeros",)}, "did you mean 'signed zero'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], expected: str) -> None:
    tree = {"weight": np.zeros(2)}
    with pytest.raises(InputError, match=expected.replace("(", r"\(")):
        compare(tree, tree, **options)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"w": "text"}, "w holds 'text', a str; expected trees of JAX arrays"),
        ({"w": np.zeros(2, complex)}, "w is complex128; expected real numbers"),
        ({"w": np.array([None])}, "dtype object"),
        ({"a.b": 1.0, "a": {"b": 1.0}}, "two tensors have the path 'a.b'"),
        ({"w": object()}, "a object; expected"),
        ({"w": torch.ones(2, device="meta")}, "w is on the meta device, where tensors have no values"),
        (torch.ones(2, device="meta"), "the tensor is on the meta device"),
        (
            {"w": torch.eye(2).to_sparse()},
            r"w is a sparse tensor \(torch.sparse_coo\); expected a dense one, as to_dense",
        ),
        ({"w": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)}, "w is a nested tensor; expected"),
    ],
)
def test_bad_trees_are_named(tree: object, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        compare(tree, tree)


@pytest.mark.parametrize("tree", [{}, [], {"w": None}, torch.nn.ReLU()])
def test_nothing_to_compare_is_no_equality(tree: object) -> None:
    for act in (compare, assert_identical):
        with pytest.raises(InputError, match=r"nothing to compare: neither a, a \w+, nor b, a \w+, holds a tensor"):
            act(tree, tree)
    assert not compare(tree, {"w": 1.0}).passed


def test_the_assertion_names_what_differs() -> None:
    same = {"w": torch.ones(2)}
    assert_identical(same, {"w": jnp.ones(2)})
    with pytest.raises(
        AssertionError, match=r"w differs in 1 of 2 elements, by up to 1 ulps; at \[1\] 1 \(0x3f800000\)"
    ):
        assert_identical(same, {"w": np.float32([1, 1 + 2**-23])})
    assert_identical(same, {"w": np.float32([1, 1 + 2**-23])}, tolerance_ulps={"w": 1})


def test_byte_order_and_strides_do_not_matter() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert compare(x.astype(">f4"), x).identical
    assert compare(x.T, torch.from_numpy(x).T).identical
    assert compare(x.T.astype(ml_dtypes.bfloat16), torch.from_numpy(x).bfloat16().T).identical
    assert compare(x[::2, ::-1], np.ascontiguousarray(x[::2, ::-1])).identical
    assert np.array_equal(bits_of(x.T), bits_of(x).T)


def test_no_framework_is_imported() -> None:
    code = """
import sys
import numpy as np
from altgrad.parity import Environment, compare
compare({"w": np.ones(2)}, {"w": 1.0})
Environment.here()
print(*{name.partition(".")[0] for name in sys.modules} & {"jax", "torch", "flax", "rich"})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []


def test_floats_are_those_of_numpy_and_ml_dtypes() -> None:
    assert all(map(is_float, NARROW))
    assert not any(is_float(np.dtype(name)) for name in ("int8", "bool", "S3", "complex64", "object"))
