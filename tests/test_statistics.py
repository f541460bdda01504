"""Counts and rates: against the exact grid, beyond 2^31, under JAX's transformations, and stalls by cause."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core import UnknownFormatError, parse
from altgrad_core.formats import EIGHT
from altgrad_core.reference import quantize_reference, round_to_format
from altgrad_jax import (
    CastCounts,
    FormatParams,
    StallCounts,
    cast_counts,
    observe,
    quantize_with_counts,
    set_format,
    stall_counts,
    stall_monitor,
    statistics,
)
from altgrad_jax.params import edges
from altgrad_jax.statistics import TallyParts, tallied, tally

WIDE = ("bf16", "fp16", "E5M6", "E4M0", "E8M2b140", "E8M0b128", "E8M0b129", "E8M0b130")
LIMB = 2**30
COUNT = st.integers(0, 2**60 - 1)


def by_hand(x: np.ndarray, name: str) -> dict[str, int]:
    """What happens to float64 values, from the code book alone."""
    known = parse(name)
    top, below = known.max_representable_value, known.to_real(known.max_code - 1)
    limit = 1.5 * top if known.mantissa_bits == 0 else top + (top - below) / 2
    magnitude = np.abs(x)
    overflow = (magnitude > limit) | ((magnitude == limit) & (known.max_code % 2 == 1))
    nonzero = (x != 0) & ~np.isnan(x)
    result = np.abs(quantize_reference(x, known, overflow="saturate"))
    return {
        "elements": x.size,
        "overflow": int(overflow.sum()),
        "nonzero": int(nonzero.sum()),
        "underflow": int((nonzero & (result < 2.0**-126)).sum()),
        "nan": int(np.isnan(x).sum()),
    }


def inputs(name: str) -> np.ndarray:
    """All values of a format, the midpoints, the float32 neighbours of both, and what is special."""
    book = parse(name).code_book()
    grid = np.unique(np.abs(book[np.isfinite(book)]))
    top = grid[-1]
    exact = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, [top + (top - grid[-2]) / 2, 1.5 * top, 2 * top]])
    close = np.minimum(exact, 3e38).astype(np.float32)
    around = [close, np.nextafter(close, np.float32(0)), np.nextafter(close, np.float32(3.1e38))]
    special = np.array([0, 1e-45, 1e-39, 2.0**-126, 1e38, np.inf, np.nan], np.float32)
    values = np.concatenate([*around, special])
    return np.concatenate([values, -values])


def limbs(*counts: int) -> jax.Array:
    return jnp.array([divmod(count, LIMB) for count in counts], jnp.int32)


# ---- counts of casts


@pytest.mark.parametrize("name", [*EIGHT, *WIDE])
def test_counts_are_those_of_the_grid(name: str) -> None:
    x = inputs(name)
    assert cast_counts(jnp.asarray(x), name).as_integers() == by_hand(x.astype(np.float64), name)
    for one in x[:: max(1, x.size // 40)]:  # one by one, lest errors cancel
        assert ONE(jnp.asarray(one[None]), FormatParams.from_format(name)).as_integers() == by_hand(
            one[None].astype(np.float64), name
        )


ONE = jax.jit(cast_counts)


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "fp16"])
def test_every_half_precision_input(name: str, dtype: Any) -> None:
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # the NaNs
        exact = x.astype(np.float64)
    assert ONE(jnp.asarray(x), FormatParams.from_format(name)).as_integers() == by_hand(exact, name)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-7, 1.0, 2.0**31])
@pytest.mark.parametrize("name", ["E0M7", "E4M3", "E7M0"])
def test_counts_under_a_scale(name: str, scale: float) -> None:
    exact = inputs(name).astype(np.float64) * scale
    x = np.clip(exact, -3e38, 3e38).astype(np.float32)
    expected = by_hand(x.astype(np.float64) / scale, name)
    assert cast_counts(jnp.asarray(x), name, scale=scale).as_integers() == expected


@pytest.mark.parametrize("rounding", ["toward_zero", "stochastic"])
def test_counted_is_the_cast_to_nearest(rounding: Any) -> None:
    x = jnp.asarray(inputs("E4M3"))
    other = FormatParams.from_format("E4M3", rounding=rounding, overflow="saturate")
    assert cast_counts(x, other).as_integers() == cast_counts(x, "E4M3").as_integers()


def test_identity_counts_infinities_and_nothing_else() -> None:
    x = jnp.asarray(np.array([1e-45, 3e38, np.inf, -np.inf, np.nan, 0], np.float32))
    expected = {"elements": 6, "overflow": 2, "nonzero": 4, "underflow": 0, "nan": 1}
    assert cast_counts(x, "float32").as_integers() == expected


def test_counts_are_told_alike_one_by_one_and_together() -> None:
    """Of any numbers, so that each of them is told apart; the amax has no part in it."""
    parts = np.random.default_rng(0).integers(0, 1000, (7, 5), dtype=np.int32)
    apart = [TallyParts(*map(jnp.int32, (*row[1:], 9))).together(int(row[0])) for row in parts]
    np.testing.assert_array_equal(tallied(jnp.asarray(parts)), np.stack(apart)[:, :5])


def test_no_elements() -> None:
    counts, amax = observe(jnp.zeros((0, 3)), "E5M2")
    assert set(counts.as_integers().values()) == {0}
    assert [float(rate) for rate in (counts.overflow_rate, counts.underflow_rate, counts.nan_rate, amax)] == [0] * 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, -3.0], 3.0), ([1e-45], 1e-45), ([1.0, -math.inf], math.inf), ([math.nan, math.inf, 1.0], math.nan)],
)
def test_amax(values: list[float], expected: float) -> None:
    _, amax = observe(jnp.asarray(np.array(values, np.float32)), "E5M2")
    np.testing.assert_array_equal(np.asarray(amax), np.float32(expected))


@pytest.mark.parametrize("size", [2**19 - 1, 2**19, 2**19 + 5])
def test_large_tensors_are_counted_in_rows(size: int) -> None:
    bits = np.random.default_rng(size).integers(0, 2**32, size, dtype=np.uint32)
    bits[::3] &= 0x807FFFFF  # subnormals
    bits[1::7] &= 0x80000000  # zeros
    bits[2::5] |= 0x7F800000  # infinities and NaN
    magnitude = (bits & 0x7FFFFFFF).astype(np.int64)
    limits = edges(FormatParams.from_format("E5M2"))
    number, nonzero = magnitude <= 0x7F800000, magnitude != 0
    expected = (
        size,
        np.sum((magnitude >= int(limits.overflows_from)) & number),
        np.sum(nonzero & number),
        np.sum(nonzero & (magnitude <= int(limits.vanishes_to))),
        np.sum(~number),
        magnitude.max(),
    )
    np.testing.assert_array_equal(jax.jit(tally)(jnp.asarray(bits.view(np.float32)), limits), expected)


def test_tensors_too_large_for_one_count(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.asarray(inputs("E5M2"))
    whole = observe(x[:-2], "E5M2")[0].as_integers()
    monkeypatch.setattr(statistics, "_MOST_AT_ONCE", 100)
    parts, amax = observe(x[:-2], "E5M2")
    assert parts.as_integers() == whole
    assert math.isnan(float(amax))


def test_jit_and_vmap() -> None:
    x = jnp.asarray(np.stack([inputs("E5M2")[:60]] * 3))
    params = FormatParams.stack([FormatParams.from_format(name) for name in ("E7M0", "E4M3", "E0M7")])
    scales = jnp.array([1.0, 2.0**-3, 4.0])
    together = jax.jit(jax.vmap(lambda x, p, s: cast_counts(x, p, scale=s)))(x, params, scales)
    for k, name in enumerate(("E7M0", "E4M3", "E0M7")):
        alone = cast_counts(x[k], name, scale=float(scales[k]))
        np.testing.assert_array_equal(together.limbs[k], alone.limbs)
    merged = {name: sum(counts) for name, counts in together.as_integers().items()}
    assert together.pooled().as_integers() == merged


@pytest.mark.parametrize("bad", [jnp.arange(3), jnp.ones(2, jnp.complex64), jnp.ones(2, bool)])
def test_counts_are_of_floats(bad: jax.Array) -> None:
    with pytest.raises(TypeError, match=bad.dtype.name):
        cast_counts(bad, "E5M2")
    with pytest.raises(UnknownFormatError, match="E5M2"):
        cast_counts(jnp.ones(2), "E5M3x")


# ---- sums that do not wrap, and rates


@given(st.lists(COUNT, min_size=5, max_size=5), st.lists(COUNT, min_size=5, max_size=5))
def test_sums_beyond_2_31(left: list[int], right: list[int]) -> None:
    total = CastCounts(limbs(*left)) + CastCounts(limbs(*right))
    assert list(total.as_integers().values()) == [a + b for a, b in zip(left, right, strict=True)]
    assert int(jnp.max(total.limbs[:, 1])) < LIMB


@given(st.integers(1, 2**53), st.data())
def test_rates_are_the_quotients(elements: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(0, elements))
    counts = CastCounts(limbs(elements, part, elements, elements - part, part))
    expected = [np.float32(part / elements), np.float32((elements - part) / elements), np.float32(part / elements)]
    assert [counts.overflow_rate, counts.underflow_rate, counts.nan_rate] == expected
    stalls = StallCounts(limbs(elements, part // 2, part - part // 2, 0))
    assert stalls.stall_rate == expected[0]
    assert stalls.saturation_rate == np.float32((part - part // 2) / elements)


def test_one_in_2_40_is_not_zero() -> None:
    assert float(CastCounts(limbs(2**40, 1, 0, 0, 0)).overflow_rate) == 2.0**-40


@pytest.mark.parametrize("entries", [1, 3, 2**15])
def test_pooled_carries(entries: int) -> None:
    each = [2**45 + 2**30 - 1, 2**30 - 1, 2**15, 2**31, 12345678901]
    pooled = jax.jit(CastCounts.pooled)(CastCounts(jnp.broadcast_to(limbs(*each), (entries, 5, 2))))
    assert list(pooled.as_integers().values()) == [entries * count for count in each]
    assert pooled.limbs.shape == (5, 2)


def test_sums_in_a_scan() -> None:
    first = CastCounts(limbs(LIMB - 2, LIMB - 1, 0, 0, 0))
    step = cast_counts(jnp.array([1e9, 1.0, 0.0]), "E5M2")
    total, _ = jax.lax.scan(lambda total, _: (total + step, None), first, length=4)
    assert total.as_integers()["elements"] == LIMB + 10
    assert total.as_integers()["overflow"] == LIMB + 3


def everything(x: jax.Array) -> dict[str, Any]:
    counts, stalls = cast_counts(x, "E4M3", scale=2.0) + cast_counts(x, "bf16"), stall_counts(x, x, "E7M0", scale=2.0)
    several = CastCounts(jnp.stack([counts.limbs, counts.limbs]))
    limbs = [counts.limbs, several.pooled().limbs, (stalls + stall_counts(x, x, "E5M2", gradient=x)).limbs]
    return {"limbs": limbs, "rates": [several.overflow_rate, counts.underflow_rate, counts.nan_rate, stalls.stall_rate]}


def dtypes(tree: Any) -> dict[str, set[str]]:
    return {name: {leaf.dtype.name for leaf in leaves} for name, leaves in tree.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_x64_and_strict_promotion_change_no_dtype(dtype: Any) -> None:
    expected = {"limbs": {"int32"}, "rates": {"float32"}}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert dtypes(jax.eval_shape(everything, jnp.ones((2, 3), dtype))) == expected
    with jax.enable_x64(True):
        assert dtypes(jax.eval_shape(everything, jnp.ones((2, 3), dtype))) == expected


# ---- stalls


@pytest.mark.parametrize("name", [*EIGHT, "bf16"])
@pytest.mark.parametrize("committed", [False, True], ids=["master", "committed"])
def test_stalls_are_those_of_the_grid(name: str, committed: bool) -> None:
    draw = np.random.default_rng(0)
    known = parse(name)
    spread = min(known.max_representable_value, 1e4)
    weight = (draw.normal(size=200) * spread / 2).astype(np.float32)
    weight[:20] = np.clip(weight[:20] * 1e3, -spread, spread)
    if committed:
        weight = np.array([round_to_format(float(w), known, overflow="saturate") for w in weight], np.float32)
    update = (draw.normal(size=200) * spread * 10.0 ** draw.uniform(-6, 1, 200)).astype(np.float32)
    update[::17] = 0
    before, after = (
        np.array([round_to_format(float(v), known, overflow="saturate") for v in values])
        for values in (weight, weight + update)
    )
    stalled = (update != 0) & (before == after)
    at_max = stalled & (np.abs(before) == known.max_representable_value) & (np.sign(before) == np.sign(update))
    gradient = np.ones(200, np.float32)
    expected = {
        "nonzero": int((update != 0).sum()),
        "precision": int((stalled & ~at_max).sum()),
        "saturation": int(at_max.sum()),
        "vanished": int((update == 0).sum()),
    }
    counts = STALLS(*map(jnp.asarray, (weight, update)), FormatParams.from_format(name), gradient=jnp.asarray(gradient))
    assert counts.as_integers() == expected
    assert float(counts.stall_rate) == np.float32(stalled.sum() / (update != 0).sum())


STALLS = jax.jit(stall_counts)


@pytest.mark.parametrize(
    ("weight", "update", "cause"),
    [
        (1.0, 0.25, None),
        (1.0, 0.125, "precision"),  # a tie goes back to the even code
        (1.25, 0.125, None),
        (1.0, 1e-40, "zero"),
        (57344.0, 1.0, "saturation"),
        (57344.0, 1e9, "saturation"),
        (57344.0, -1.0, "precision"),
        (57344.0, -8192.0, None),
        (-57344.0, -1e30, "saturation"),
        (-57344.0, 1.0, "precision"),
        (60000.0, 1.0, "saturation"),
        (0.0, 1e-9, "precision"),
        (1.0, math.nan, None),
        (1.0, 0.0, "zero"),
    ],
)
def test_cause_of_a_stall(weight: float, update: float, cause: str | None) -> None:
    counts = STALLS(*(jnp.asarray(np.array([v], np.float32)) for v in (weight, update)), FORMAT).as_integers()
    expected = {"nonzero": [int(cause != "zero")], "precision": [0], "saturation": [0], "vanished": [0]}
    if cause in ("precision", "saturation"):
        expected[cause] = [1]
    assert {name: [count] for name, count in counts.items()} == expected


FORMAT = FormatParams.from_format("E5M2")


def test_vanished_updates_are_apart() -> None:
    gradient = jnp.asarray(np.array([1.0, 1e-45, 0.0, -0.0], np.float32))
    counts = stall_counts(jnp.ones(4), jnp.array([0.0, -0.0, 0.0, 0.0]), "E5M2", gradient=gradient)
    assert counts.as_integers() == {"nonzero": 0, "precision": 0, "saturation": 0, "vanished": 1}
    assert float(counts.stall_rate) == 0


def test_stall_under_a_scale() -> None:
    weight, update = jnp.array([4.0, 4.0, 496.0]), jnp.array([0.1, 0.2, 1.0])
    counts = stall_counts(weight, update, "E3M4", scale=4.0)  # values 4, 4.25, ..., 496
    assert counts.as_integers() == {"nonzero": 3, "precision": 1, "saturation": 1, "vanished": 0}


def test_stall_rounds_to_nearest_whatever_the_params_round_like() -> None:
    weight, update = jnp.array([1.0, 1.0]), jnp.array([0.2, 0.1])
    stochastic = FormatParams.from_format("E5M2", rounding="stochastic")
    assert stall_counts(weight, update, stochastic).as_integers()["precision"] == 1


def test_shapes_of_a_stall() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(2,\) but update \(3,\)"):
        stall_counts(jnp.ones(2), jnp.ones(3), "E5M2")


# ---- the monitor


def test_monitor_sees_the_real_update() -> None:
    params = {"w": jnp.array([1.0, 1.0, 1.5, 0.0]), "b": jnp.array([8.0])}
    tx = optax.chain(optax.sgd(0.01), stall_monitor("E5M2"))
    grads = {"w": jnp.array([-100.0, -1.0, -1.0, 0.0]), "b": jnp.array([-1.0])}
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert float(optax.tree.get(state, "stall_rate")) == 0.75  # the first alone moves; the zero does not count
    np.testing.assert_array_equal(optax.tree.get(state, "stall_rates"), np.float32([1, 2 / 3]))  # of b and of w
    plain, _ = optax.sgd(0.01).update(grads, optax.sgd(0.01).init(params))
    np.testing.assert_array_equal(updates["w"], plain["w"])


def test_monitor_scales_each_leaf_by_its_amax() -> None:
    params = {"w": jnp.array([2.0**-20, 2.0**-21])}  # below every value of E3M4, whose scale must follow
    tx = stall_monitor("E3M4")
    for update, rate in ((2.0**-23, 0.0), (2.0**-30, 1.0)):
        _, state = tx.update({"w": jnp.full(2, update)}, tx.init(params), params)
        assert float(state.stall_rate) == rate


def test_monitor_at_max() -> None:
    params = {"w": jnp.array([448.0, 1.0])}
    _, state = stall_monitor("E4M3").update({"w": jnp.array([1e-3, 1.0])}, stall_monitor("E4M3").init(params), params)
    assert (float(state.stall_rate), float(state.saturation_rate)) == (0.5, 0.5)
    assert (float(state.stall_rates[0]), float(state.saturation_rates[0])) == (0.5, 0.5)


def test_monitor_mask() -> None:
    params = {"w": jnp.ones(2), "b": jnp.ones(6)}
    tx = stall_monitor("E5M2", mask={"w": True, "b": False})
    _, state = tx.update({"w": jnp.array([1.0, 1e-6]), "b": jnp.full(6, 1e-6)}, tx.init(params), params)
    assert float(state.stall_rate) == 0.5
    assert [leaf.shape for leaf in (tx.init(params).stall_rates, state.stall_rates)] == [(1,), (1,)]


def test_a_stall_monitor_that_no_parameter_is_for() -> None:
    elements = {"watched": stall_monitor("E5M2"), "free": optax.sgd(0.5)}
    params = {"w": jnp.ones(2)}
    tx = optax.partition(elements, {"w": "free"})
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["w"].tolist() == [-0.5, -0.5]


def test_monitor_follows_set_format_and_needs_params() -> None:
    params = {"w": jnp.ones(1)}
    tx = stall_monitor("E0M7")
    state = tx.init(params)
    update = {"w": jnp.array([0.06])}
    rates = [float(tx.update(update, set_format(state, name), params)[1].stall_rate) for name in ("E0M7", "E5M2")]
    assert rates == [0.0, 1.0]
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(update, state)


@pytest.mark.parametrize("scale", [0.3, 7.7, 1.0, 2.0**-100, 2.0**100, 1e-30, 3e30])
@pytest.mark.parametrize("name", ["E7M0", "E4M3", "E0M7", "bf16", "float32", "float8_e8m0fnu"])
def test_one_scale_for_all_counts_like_one_for_each(name: str, scale: float) -> None:
    """The first moves the limits, the second divides: on the magnitudes where the limits come to lie, and around."""
    bits = np.random.default_rng(7).integers(0, 2**31, 2**12, dtype=np.uint32)
    limits = [0, 1, 2, 0x7F_FFFF, 0x80_0000, 0x7F7F_FFFF, 0x7F80_0000, 0x7FC0_0000]
    maximum = float(np.float32(parse(name).max_representable_value)) * scale
    near = np.float32(min(maximum, 3e38)).view(np.uint32) + np.arange(-(2**9), 2**9)
    x = jnp.asarray(np.concatenate([bits, np.array(limits), near]).astype(np.uint32).view(np.float32))
    each = jnp.full(x.shape, np.float32(scale))
    together = cast_counts(x, name, scale=scale).as_integers()
    assert together == cast_counts(x, name, scale=each).as_integers()
    assert together["overflow"] > 0


@pytest.mark.parametrize("sizes", ["n, 64", "n, m", "3, n"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.5, "rows"])
def test_counts_are_exported_for_any_size(sizes: str, dtype: Any, scale: Any) -> None:
    def counted(x: jax.Array) -> tuple[CastCounts, tuple[jax.Array, CastCounts]]:
        scales = jnp.full((x.shape[0], 1), 2.0) if scale == "rows" else scale
        return cast_counts(x, "E4M3", scale=scales), quantize_with_counts(x, "E4M3", scale=scales)

    shape = jax.export.symbolic_shape(sizes)
    exported = jax.export.export(jax.jit(counted))(jax.ShapeDtypeStruct(shape, dtype))
    given = jnp.geomspace(1e-6, 1e6, 3 * 64).at[7].set(jnp.nan).reshape(3, 64).astype(dtype)
    for wanted, got in zip(jax.tree.leaves(counted(given)), jax.tree.leaves(exported.call(given)), strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32), wanted.astype(jnp.float32))


def test_exported_counts_do_not_wrap() -> None:
    """More than 2^32 elements, of which none is stored."""

    def counted(x: jax.Array) -> CastCounts:
        return cast_counts(jnp.broadcast_to(x, (x.shape[0], 2**20)), "E4M3")

    exported = jax.export.export(jax.jit(counted))(jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 1"), jnp.float32))
    count = 4097 * 2**20
    wanted = {"elements": count, "overflow": count, "nonzero": count, "underflow": 0, "nan": 0}
    assert exported.call(jnp.full((4097, 1), 1e6)).as_integers() == wanted
