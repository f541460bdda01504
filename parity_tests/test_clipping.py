"""Clipping: decision, norm, coefficient and gradients have the same bits in both packages, and are right.

Against ``torch.nn.utils.clip_grad_norm_`` itself, in float32, agreement is bounded by *its* error:
about 200 ulp on normal data, thousands on constants, since it sums squares in float32. The tight reference is the same
rule in float64, from which the promise is 3 ulp: half an ulp each for the norm, the coefficient and the product, of
numbers whose ulp may be twice as large relative to them as that of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import altgrad_jax
import altgrad_jax.clipping as in_jax
import altgrad_torch
import altgrad_torch.clipping as in_torch
from altgrad_core.formats import Format, parse
from altgrad_core.stability import clip_threshold
from altgrad_jax.clip_groups import format_threshold
from altgrad_jax.params import FormatParams
from parity_tests.support import EIGHT, MIN_NORMAL, as_numpy, assert_same_bits, assert_same_values, to_torch, widened

Single = npt.NDArray[np.float32]

SHAPES = ((7, 5), (11,), (), (2, 3, 4))
FLOAT32_MAX = float(np.finfo(np.float32).max)
NARROW_TO_WIDE = ("E0M7", "E3M4", "E5M2", "E7M0")
ULP = 2.0**-23


def tree(values: npt.NDArray[np.float64] | Single) -> list[Single]:
    """Cut numbers into the tensors of a small model."""
    cuts = np.cumsum([math.prod(shape) for shape in SHAPES])[:-1]
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    return [part.reshape(shape) for part, shape in zip(np.split(single, cuts), SHAPES, strict=True)]


SIZE = sum(math.prod(shape) for shape in SHAPES)
NORMAL = np.random.default_rng(9).standard_normal(SIZE)
FINITE_TREES = {
    "normal": tree(NORMAL),
    "lognormal": tree(np.exp(7 * NORMAL)),
    "constant": tree(np.full(SIZE, 0.1)),
    "zero": tree(np.zeros(SIZE)),
    "huge": tree(NORMAL * 1e19),
    "norm beyond float32": tree(np.sign(NORMAL) * 3e38),
    "tiny": tree(NORMAL * 1e-20),
    "subnormal": tree(NORMAL * 1e-40),
    "one subnormal": tree(np.where(np.arange(SIZE) == 3, 1e-45, 0.0)),
    "around 2^-126": tree(NORMAL * 2.0**-126),
    "mixed": tree(NORMAL * 10.0 ** np.linspace(-44, 38, SIZE)),
}
OTHER_TREES = {
    "inf": tree(np.where(np.arange(SIZE) == 3, np.inf, NORMAL)),
    "-inf": tree(np.where(np.arange(SIZE) == 40, -np.inf, NORMAL)),
    "nan": tree(np.where(np.arange(SIZE) == 3, np.nan, NORMAL)),
    "inf and nan": tree(np.where(np.arange(SIZE) == 3, np.nan, np.where(np.arange(SIZE) == 40, np.inf, NORMAL))),
}
ALL_TREES = FINITE_TREES | OTHER_TREES


def correctly_rounded_norm(leaves: list[Single]) -> np.float32:
    """The float32 nearest to the true norm, from exact squares and a correctly rounded sum of them.

    Two neighbouring float32 are told apart by the square of their midpoint; that the sum's own rounding cannot matter
    is asserted.
    """
    squares = [value * value for leaf in leaves for value in widened(leaf).reshape(-1).tolist()]
    total = Fraction(math.fsum(squares))
    nearest = np.float32(min(math.sqrt(total), FLOAT32_MAX))
    with np.errstate(over="ignore"):
        low, high = np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf))
    for neighbour, better in ((low, lambda edge: total < edge), (high, lambda edge: total > edge)):
        if not np.isfinite(neighbour) or neighbour == nearest:
            continue
        edge = ((Fraction(float(nearest)) + Fraction(float(neighbour))) / 2) ** 2
        assert total == edge == 0 or abs(total - edge) > total / 2**52, "this input is on a tie; choose another"
        if better(edge):
            nearest = neighbour
    return nearest


@jax.jit
def jax_norm(leaves: list[jax.Array]) -> jax.Array:
    return altgrad_jax.global_norm(leaves)


def torch_norm(leaves: list[Single]) -> torch.Tensor:
    return altgrad_torch.global_norm([to_torch(np.asarray(leaf)) for leaf in leaves])


def parameters(leaves: list[Single], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Parameters with these gradients."""
    made = [torch.nn.Parameter(torch.zeros(leaf.shape, dtype=dtype)) for leaf in leaves]
    for parameter, leaf in zip(made, leaves, strict=True):
        parameter.grad = torch.tensor(leaf).to(dtype)
    return made


GATED = in_jax.partition_relative_clip("E5M2")


@jax.jit
def jax_gated(
    leaves: list[jax.Array], params: FormatParams, rate: jax.Array
) -> tuple[list[jax.Array], in_jax.PartitionRelativeClipState]:
    """One update of the gated clipper, with the format as data."""
    return GATED.update(leaves, GATED.init(leaves)._replace(format=params), overflow_rate=rate)


def assert_same_clipping(leaves: list[Single], format: Format, rate: float, dtype: str = "float32") -> list[jax.Array]:
    """Both packages clip the same tree; returns what JAX made of it."""
    clipped, state = jax_gated(
        [jnp.asarray(leaf).astype(dtype) for leaf in leaves], FormatParams.from_format(format), jnp.float32(rate)
    )
    model = parameters(leaves, getattr(torch, dtype))
    clipper = in_torch.PartitionRelativeClipper(format)
    opened = clipper.clip_if_needed(model, rate)
    assert opened == bool(state.clipped)
    assert_same_values(np.float32(clipper.total_norm), np.asarray(state.total_norm), what="norm")
    for k, (ours, parameter) in enumerate(zip(clipped, model, strict=True)):
        assert_same_values(ours, parameter.grad, leaves[k], f"leaf {k}")
    return clipped


def assert_follows_the_rule(clipped: list[jax.Array], leaves: list[Single], max_norm: float) -> None:
    """``clip_grad_norm_`` as it is written, in float64: within 3 ulp, and what is below 2^-126 is zero or next to it.

    Two limits of float32 show: a norm beyond its maximum counts as that, and a coefficient below 2^-126 as zero.
    """
    wide = [widened(leaf) for leaf in leaves]
    norm = math.sqrt(math.fsum(value * value for leaf in wide for value in leaf.reshape(-1).tolist()))
    coefficient = min(1.0, max_norm / (min(norm, FLOAT32_MAX) + 1e-6))
    for ours, leaf in zip(clipped, wide, strict=True):
        exact = leaf * (coefficient if coefficient >= MIN_NORMAL else 0.0)
        error, size = np.abs(widened(np.asarray(ours)) - exact), np.abs(exact)
        unit = np.spacing(np.maximum(size, MIN_NORMAL).astype(np.float32)).astype(np.float64)
        assert np.where(size >= MIN_NORMAL, error <= 3 * unit, error <= MIN_NORMAL).all()


# The norm


@pytest.mark.parametrize("name", FINITE_TREES)
def test_norm_is_correctly_rounded(name: str) -> None:
    expected = correctly_rounded_norm(FINITE_TREES[name])
    assert_same_bits(jax_norm(FINITE_TREES[name]), expected, what="jax")
    assert_same_bits(torch_norm(FINITE_TREES[name]), expected, what="torch")


@pytest.mark.parametrize("name", OTHER_TREES)
def test_norm_of_what_is_not_finite(name: str) -> None:
    from_jax, from_torch = float(jax_norm(OTHER_TREES[name])), float(torch_norm(OTHER_TREES[name]))
    if "nan" in name:
        assert math.isnan(from_jax)
        assert math.isnan(from_torch)
    else:
        assert from_jax == from_torch == math.inf


@pytest.mark.parametrize("scale", [1.0, 1e19, 1e-20, 3e-40])
@pytest.mark.parametrize("kind", ["normal", "constant"])
def test_norm_of_many_elements(kind: str, scale: float) -> None:
    """More than one chunk in torch and more than one row in JAX, with rests; torch's own is far off."""
    values = np.random.default_rng(10).standard_normal(100_003) if kind == "normal" else np.full(100_003, 0.1)
    leaves = [(values * scale).astype(np.float32), np.float32([scale])]
    expected = correctly_rounded_norm(leaves)
    assert_same_bits(jax_norm(leaves), expected, what="jax")
    assert_same_bits(torch_norm(leaves), expected, what="torch")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norm_of_half_precision(dtype: str) -> None:
    leaves = [jnp.asarray(leaf).astype(dtype) for leaf in FINITE_TREES["normal"]]
    expected = correctly_rounded_norm([np.asarray(leaf.astype(jnp.float32)) for leaf in leaves])
    assert_same_bits(jax_norm(leaves), expected, what="jax")
    tensors = [to_torch(leaf).to(getattr(torch, dtype)) for leaf in FINITE_TREES["normal"]]
    assert_same_bits(altgrad_torch.global_norm(tensors), expected, what="torch")


def test_norm_of_float64() -> None:
    leaves = [NORMAL * 1e-200, np.array([1e-60])]
    with jax.enable_x64(True):
        assert float(altgrad_jax.global_norm([jnp.asarray(leaf) for leaf in leaves])) == 0.0
        from_jax = altgrad_jax.global_norm([jnp.asarray(NORMAL)])
    assert float(altgrad_torch.global_norm([to_torch(leaf) for leaf in leaves])) == 0.0
    assert_same_bits(from_jax, altgrad_torch.global_norm([to_torch(NORMAL)]))


def test_norm_of_empty_tensors() -> None:
    leaves = [np.zeros((0, 3), np.float32), np.float32([3, 4])]
    assert float(altgrad_jax.global_norm(leaves)) == float(torch_norm(leaves)) == 5.0
    assert float(altgrad_jax.global_norm(leaves[:1])) == float(torch_norm(leaves[:1])) == 0.0


# The clipped gradients


@pytest.mark.parametrize("name", ALL_TREES)
@pytest.mark.parametrize("format", [parse(name) for name in NARROW_TO_WIDE], ids=str)
def test_same_clipping(name: str, format: Format) -> None:
    leaves = ALL_TREES[name]
    clipped = assert_same_clipping(leaves, format, rate=0.01)
    if name in FINITE_TREES:
        assert_follows_the_rule(clipped, leaves, clip_threshold(format))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["normal", "zero", "constant", "tiny", "lognormal", "inf", "nan", "mixed"])
def test_same_clipping_of_half_precision(dtype: str, name: str) -> None:
    """In float16 some of these overflow before they are clipped: that is an inf, and treated as one."""
    for each in ("E3M4", "E5M2"):
        assert_same_clipping(ALL_TREES[name], parse(each), rate=0.5, dtype=dtype)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    decades=st.tuples(st.floats(-45, 38), st.floats(0, 40)),
    format=st.sampled_from(EIGHT),
    rate=st.floats(0, 1),
)
def test_same_clipping_of_random_trees(seed: int, decades: tuple[float, float], format: Format, rate: float) -> None:
    """From all elements of one magnitude to elements that span float32's range."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        values = rng.standard_normal(SIZE) * 10.0 ** (decades[0] - decades[1] * rng.random(SIZE))
    leaves = tree(values)
    clipped = assert_same_clipping(leaves, format, rate)
    if rate >= 0.01 and all(np.isfinite(leaf).all() for leaf in leaves):
        assert_follows_the_rule(clipped, leaves, clip_threshold(format))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-20, 60))
def test_results_around_the_smallest_normal(seed: int, exponent: int) -> None:
    """Where a product is just below 2^-126, one framework would flush it and the other round it up."""
    large = float(np.float32(np.random.default_rng(seed).uniform(1, 2) * 2.0**exponent))
    norm, threshold = float(np.float32(math.sqrt(large * large))), clip_threshold("E3M4")
    coefficient = np.float32(min(1.0, threshold / (norm + 1e-6)))
    edge = np.float32(2.0**-126 / float(coefficient)).view(np.uint32)
    small = (edge + np.arange(-20, 20)).astype(np.uint32).view(np.float32)
    values = np.zeros(SIZE, np.float32)
    values[0], values[1 : 1 + small.size] = large, small
    values[1:30:2] *= -1
    assert_same_clipping(tree(values), parse("E3M4"), rate=1.0)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e-30, 1e30])
def test_plain_clipping(max_norm: float) -> None:
    """``clip_by_global_norm`` and ``clip_grad_norm_``; a norm of 0 makes everything zero, with its sign."""
    element = in_jax.clip_by_global_norm(max_norm)
    update = jax.jit(element.update)
    for name, leaves in ALL_TREES.items():
        clipped, state = update(leaves, element.init(leaves))
        model = parameters(leaves)
        norm = in_torch.clip_grad_norm_(model, max_norm)
        assert_same_values(state.total_norm, norm, what=name)
        for ours, parameter in zip(clipped, model, strict=True):
            assert_same_values(ours, parameter.grad, what=name)
        if max_norm == 0.0 and name in FINITE_TREES:
            zeros = [np.copysign(np.float32(0), leaf) for leaf in leaves]
            assert all(
                np.array_equal(np.signbit(ours), np.signbit(zero)) for ours, zero in zip(clipped, zeros, strict=True)
            )
            assert not any(np.asarray(ours).any() for ours in clipped)


def test_infinite_max_norm_only_measures() -> None:
    model = parameters(FINITE_TREES["normal"])
    norm = in_torch.clip_grad_norm_(model, math.inf)
    assert_same_bits(norm, correctly_rounded_norm(FINITE_TREES["normal"]))
    for parameter, leaf in zip(model, FINITE_TREES["normal"], strict=True):
        assert_same_bits(parameter.grad, leaf)


def test_float64_gradients() -> None:
    """They are scaled by the float64 coefficient, and not flushed."""
    values = np.concatenate([NORMAL, [1e-50, 1e-300]])
    element = in_jax.clip_by_global_norm(0.7)
    with jax.enable_x64(True):
        clipped, _ = element.update([jnp.asarray(values)], element.init([jnp.asarray(values)]))
    parameter = torch.nn.Parameter(torch.zeros(values.size, dtype=torch.float64))
    parameter.grad = to_torch(values.copy())
    in_torch.clip_grad_norm_([parameter], 0.7)
    assert_same_bits(clipped[0], parameter.grad)


# Against clip_grad_norm_ itself


@pytest.mark.parametrize("kind", ["normal", "lognormal", "constant"])
@pytest.mark.parametrize("max_norm", [1.0, 0.3])
def test_against_clip_grad_norm_in_its_own_precision(kind: str, max_norm: float) -> None:
    """The gradients part by no more than torch's norm is off, plus 5 ulp for the two roundings of each side.

    torch's error itself is bounded as measured: 200 ulp on normal data, 4,000 on constants.
    """
    normal = np.random.default_rng(11).standard_normal(2**16)
    values = {"normal": normal, "lognormal": np.exp(normal), "constant": np.full(2**16, 0.1)}[kind]
    leaves = [values.astype(np.float32).reshape(256, 256), NORMAL.astype(np.float32)]
    theirs, ours = parameters(leaves), parameters(leaves)
    their_norm = float(torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    our_norm = float(in_torch.clip_grad_norm_(ours, max_norm))
    element = in_jax.clip_by_global_norm(max_norm)
    in_both, _ = element.update(leaves, element.init(leaves))
    error = abs(their_norm - our_norm) / our_norm
    assert error <= {"normal": 200, "lognormal": 200, "constant": 4000}[kind] * ULP
    for their, our, from_jax in zip(theirs, ours, in_both, strict=True):
        assert_same_bits(from_jax, our.grad)
        difference = (their.grad.double() - our.grad.double()).abs()
        assert (difference <= (error + 5 * ULP) * our.grad.double().abs()).all()


def test_where_clip_grad_norm_fails() -> None:
    """Finite gradients of 1e19 and more: float32 squares overflow, and torch makes every gradient zero."""
    theirs, ours = parameters(FINITE_TREES["huge"]), parameters(FINITE_TREES["huge"])
    assert float(torch.nn.utils.clip_grad_norm_(theirs, 1.0)) == math.inf
    assert all((parameter.grad == 0).all() for parameter in theirs)
    in_torch.clip_grad_norm_(ours, 1.0)
    assert float(altgrad_torch.global_norm([parameter.grad for parameter in ours])) == pytest.approx(1.0)


# The gate


@pytest.mark.parametrize("threshold", [0.01, 0.5, 1 / 3])
def test_gate_below_at_and_above(threshold: float) -> None:
    """One float32 below the threshold is shut, and nothing is touched or measured; at it and above, open."""
    leaves, at = FINITE_TREES["normal"], np.float32(threshold)
    element = in_jax.partition_relative_clip("E3M4", overflow_threshold=threshold)
    clipper = in_torch.PartitionRelativeClipper("E3M4", overflow_threshold=threshold)
    below, above = np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(1))
    for rate, is_open in ((below, False), (at, True), (above, True), (threshold, True), (0.0, False), (1.0, True)):
        model = parameters(leaves)
        assert clipper.clip_if_needed(model, float(rate)) is is_open
        clipped, state = element.update(leaves, element.init(leaves), overflow_rate=float(rate))
        assert bool(state.clipped) is is_open
        assert (clipper.total_norm == -1.0) is not is_open
        assert float(state.total_norm) == clipper.total_norm
        for leaf, ours, parameter in zip(leaves, clipped, model, strict=True):
            assert_same_bits(ours, parameter.grad)
            assert np.array_equal(leaf, as_numpy(parameter.grad)) is not is_open


RATE = st.just(0.0) | st.floats(2.0**-126, 1)


@given(RATE, RATE)
def test_gate_decides_in_float32(rate: float, threshold: float) -> None:
    """Rates of counts are no smaller than 2^-63; float32 subnormals, which XLA reads as zero, are none."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    opened = in_torch.PartitionRelativeClipper("E5M2", overflow_threshold=threshold).clip_if_needed([parameter], rate)
    assert opened == bool(jax_is_open(np.float32(rate), np.float32(threshold)))


@jax.jit
def jax_is_open(rate: jax.Array, threshold: jax.Array) -> jax.Array:
    """The gate's comparison; the tests around this one see that the element makes it so."""
    return ~(rate < threshold)


def test_rate_from_counts() -> None:
    """A rate comes as the 0-d tensor or array that the counts give."""
    import altgrad_jax.statistics as counts_in_jax
    import altgrad_torch.statistics as counts_in_torch

    leaf = np.float32([1e9, 1.0, 2.0, 3.0])
    model = parameters([leaf])
    rate = counts_in_torch.cast_counts(to_torch(leaf), "E5M2").overflow_rate
    assert in_torch.PartitionRelativeClipper("E5M2", overflow_threshold=0.25).clip_if_needed(model, rate)
    element = in_jax.partition_relative_clip("E5M2", overflow_threshold=0.25)
    rate = counts_in_jax.cast_counts(jnp.asarray(leaf), "E5M2").overflow_rate
    clipped, _ = element.update([leaf], element.init([leaf]), overflow_rate=rate)
    assert_same_bits(clipped[0], model[0].grad)


@pytest.mark.parametrize("base_clip", [1.0, 0.1, 3.7e-5, 1e10])
@pytest.mark.parametrize("format", EIGHT, ids=str)
def test_thresholds(format: Format, base_clip: float) -> None:
    """Core, torch and, under jit, JAX: a norm of far more than the threshold is clipped to it."""
    expected = clip_threshold(format, base_clip)
    assert in_torch.PartitionRelativeClipper(format, base_clip).clip_threshold == expected
    traced = jax.jit(format_threshold, static_argnums=1)(FormatParams.from_format(format), base_clip)
    assert_same_bits(traced, np.float32(expected))


# In their surroundings


def test_clipped_before_the_optimizer() -> None:
    """In an optax chain and before a torch optimizer: the same weights after plain gradient descent."""
    leaves = FINITE_TREES["normal"]
    chain = optax.chain(in_jax.partition_relative_clip("E3M4"), optax.sgd(0.5))
    updates, state = chain.update(leaves, chain.init(leaves), overflow_rate=0.02)
    model = parameters(leaves)
    in_torch.PartitionRelativeClipper("E3M4").clip_if_needed(model, 0.02)
    torch.optim.SGD(model, lr=0.5).step()
    for update, parameter in zip(updates, model, strict=True):
        assert_same_bits(update + 0.0, parameter.detach() + 0.0)
    assert bool(optax.tree.get(state, "clipped"))


def test_parameters_without_gradient_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].weight.grad = torch.full((2, 2), 5.0)
    clipper = in_torch.PartitionRelativeClipper("E5M2")
    assert clipper.clip_if_needed(model, 1.0)
    assert clipper.total_norm == 10.0
    assert model[1].weight.grad is None


def test_total_norm_is_never_stale() -> None:
    clipper, model = in_torch.PartitionRelativeClipper("E5M2"), parameters(FINITE_TREES["normal"])
    clipper.clip_if_needed(model, 1.0)
    assert clipper.total_norm > 0
    with pytest.raises(ValueError, match="overflow_rate"):
        clipper.clip_if_needed(model, 2.0)
    assert clipper.total_norm == -1.0


@pytest.fixture
def one_process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("one_process_group")
def test_sharded_gradients_beside_plain_ones() -> None:
    """DTensors go through the same rule. On one process, so it is their operations that are tried, not their sums."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh, leaves = init_device_mesh("cpu", (1,)), FINITE_TREES["huge"]
    plain, mixed = parameters(leaves), parameters(leaves)
    for k in (0, 3):
        mixed[k] = torch.nn.Parameter(distribute_tensor(torch.zeros(SHAPES[k]), mesh, [Shard(0)]))
        mixed[k].grad = distribute_tensor(torch.tensor(leaves[k]), mesh, [Shard(0)])
    clippers = in_torch.PartitionRelativeClipper("E3M4"), in_torch.PartitionRelativeClipper("E3M4")
    assert clippers[0].clip_if_needed(plain, 0.02)
    assert clippers[1].clip_if_needed(mixed, 0.02)
    assert clippers[0].total_norm == clippers[1].total_norm
    for expected, parameter in zip(plain, mixed, strict=True):
        actual = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        assert_same_bits(actual, expected.grad)
