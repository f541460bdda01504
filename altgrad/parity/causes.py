"""Recognises why two tensors differ: from the operation that made them, or from the two alone where that is enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import ml_dtypes
import numpy as np
import numpy.typing as npt

from altgrad.parity.arithmetic import cause_in_arithmetic
from altgrad.parity.casts import cause_in_cast
from altgrad.parity.cause import UNKNOWN, Cause, CauseName
from altgrad.parity.clips import cause_in_clip, cause_in_coefficient
from altgrad.parity.exact import Float64, rounded
from altgrad.parity.floats import (
    Array,
    bits_of,
    is_exact,
    is_float,
    is_infinite,
    is_nan,
    is_subnormal,
    magnitudes,
    ulps_between,
    widened,
)
from altgrad.parity.functions import FUNCTIONS, cause_in_function
from altgrad.parity.leaves import Leaf, as_array
from altgrad.parity.operation import Operation
from altgrad.parity.sums import cause_in_sum, terms_of_dot, terms_of_sum
from altgrad.parity.ways import same_values
from altgrad_core.formats import FORMAT_REGISTRY

_MOST_ELEMENTS = 65_536
"""Differing elements that are looked at; more say nothing new."""
_ENOUGH = 8
"""Elements that all lie on a narrower dtype's grid: 1 in 2^13 does by chance, so eight do not."""
_STEPS_APART = 4
"""Steps of the narrower dtype by which an operation computed in it may be off: inputs and result are rounded."""


def recognise(a: Leaf, b: Leaf) -> Cause:
    """Why two tensors differ; ``unknown`` where neither their operation nor the two alone show it.

    Args:
        a: a tensor, with the operation that made it if that is known.
        b: its counterpart. An operation of one side is taken to be that of both.

    >>> x = np.linspace(0, 1, 8, dtype=np.float32)
    >>> made = Operation("multiply_add", {"x": x, "y": x, "z": -x})
    >>> twice = x * x - x
    >>> once = (x.astype(np.float64) * x - x).astype(np.float32)
    >>> recognise(Leaf(once, made), Leaf(twice, made)).told()
    'fused multiply-add: a rounded once; b rounded twice; explains all 2 elements looked at'
    """
    if a.array.shape != b.array.shape:
        return Cause(("shape",), (f"has {a.array.shape}", f"has {b.array.shape}"))
    if a.array.dtype != b.array.dtype:
        return _of_two_dtypes(a.array, b.array)
    places = np.flatnonzero(bits_of(a.array) != bits_of(b.array))[:_MOST_ELEMENTS]
    if not places.size:
        return UNKNOWN
    apart = _operations_apart(a.operation, b.operation)
    if apart is not None:
        return apart
    one, other = a.array.reshape(-1)[places], b.array.reshape(-1)[places]
    if not is_float(one.dtype):
        return UNKNOWN
    operation = a.operation or b.operation
    by_operation = None if operation is None else _by_operation(a.array, b.array, operation, places)
    return by_operation or _by_kinds(one, other) or _by_grid(one, other) or UNKNOWN


def _operations_apart(a: Operation | None, b: Operation | None) -> Cause | None:
    """The cause that lies before the operation: it is another one, or given something else."""
    if a is None or b is None:
        return None
    if (a.name, a.format, a.max_norm) != (b.name, b.format, b.max_norm):
        return Cause(("operations differ",), (f"did {a}", f"did {b}"))
    for name, given in a.inputs.items():
        one, other = as_array(given, name), as_array(b.inputs[name], name)
        if one.shape != other.shape or not same_values(*(_comparable(each) for each in (one, other))):
            return Cause(("inputs differ",), (f"was given another {name} than the other side", ""))
    return None


def _comparable(x: Array) -> Array:
    """Of an input its numbers count, not its dtype: a constant of 64 bits is as good as one of 32."""
    return widened(x) if is_float(x.dtype) else x


def _by_operation(a: Array, b: Array, operation: Operation, places: np.ndarray) -> Cause | None:
    """The cause in the elements at the places where two tensors differ, by what their operation would make of them."""
    inputs = {name: as_array(given, name) for name, given in operation.inputs.items()}
    if not all(is_float(given.dtype) for given in inputs.values()):
        return None
    if operation.name in ("sum", "dot"):
        terms = _terms(operation, inputs, a.size, places)
        if terms is None:
            return None
        places = places[: len(terms)]
        return cause_in_sum(a.reshape(-1)[places], b.reshape(-1)[places], terms)
    if operation.name in FUNCTIONS:
        places = np.union1d(places, np.arange(min(a.size, _MOST_ELEMENTS)))
    given = _at(inputs, a.shape, places)
    if given is None:
        return None
    a, b = a.reshape(-1)[places], b.reshape(-1)[places]
    if operation.name in FUNCTIONS:
        return cause_in_function(operation.name, a, b, given["x"])
    if operation.format is not None:
        return cause_in_cast(a, b, given["x"], operation.format)
    if operation.max_norm is not None and operation.name == "clip":
        return cause_in_clip(a, b, given["x"], given["norm"], operation.max_norm)
    if operation.max_norm is not None:
        return cause_in_coefficient(a, b, given["norm"], operation.max_norm)
    return cause_in_arithmetic(operation.name, a, b, given)


def _terms(operation: Operation, inputs: Mapping[str, Array], size: int, places: np.ndarray) -> Float64 | None:
    if operation.name == "sum":
        return terms_of_sum(inputs["x"], operation.axis, size, places)
    return terms_of_dot(inputs["x"], inputs["y"], size, places)


def _at(inputs: Mapping[str, Array], shape: tuple[int, ...], places: np.ndarray) -> dict[str, Array] | None:
    """The inputs' elements at some places of the result, None if they do not broadcast to its shape."""
    try:
        return {name: np.broadcast_to(given, shape).reshape(-1)[places] for name, given in inputs.items()}
    except ValueError:
        return None


def _of_two_dtypes(a: Array, b: Array) -> Cause:
    """The cause where the dtypes differ: promotion, if the wider rounds to the narrower, or integers are the same."""
    sides = f"is {a.dtype}", f"is {b.dtype}"
    wide, narrow = (a, b) if a.dtype.itemsize >= b.dtype.itemsize else (b, a)
    if is_exact(a.dtype) and is_exact(b.dtype):
        is_promotion = _same_integers(a, b)
    elif is_float(a.dtype) and is_float(b.dtype):
        is_promotion = same_values(rounded(widened(wide), narrow.dtype), narrow)
    else:
        is_promotion = False
    return Cause(("dtype promotion",), sides, a.size) if is_promotion else Cause(("unknown",), sides)


def _same_integers(a: Array, b: Array) -> bool:
    """Whether integers of two dtypes are the same numbers: also of 64 bits with and without a sign."""
    (negative_a, bits_a), (negative_b, bits_b) = (_sign_and_bits(x) for x in (a, b))
    return bool(np.all((negative_a == negative_b) & (bits_a == bits_b)))


def _sign_and_bits(x: Array) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
    """Where integers are negative, and each modulo 2^64."""
    if x.dtype == np.uint64:
        return np.zeros(x.shape, bool), x.astype(np.uint64)
    wide = x.astype(np.int64)
    return wide < 0, wide.astype(np.uint64)


def _by_kinds(a: Array, b: Array) -> Cause | None:
    """The cause where every element differs in a way that shows what it is."""
    left = np.ones(a.shape, bool)
    found: list[tuple[CauseName, str, str]] = []
    for name, sides, where in _kinds(a, b):
        if np.any(where & left):
            found.append((name, *sides))
            left &= ~where
    # The same name with the sides in both roles is no cause: nobody saturates here and not there.
    names = tuple(dict.fromkeys(name for name, *_ in found))
    if np.any(left) or len(names) != len(found):
        return None
    sides = ", ".join(did for _, did, _ in found), ", ".join(did for *_, did in found)
    return Cause(names, sides, a.size)


def _kinds(a: Array, b: Array) -> Iterator[tuple[CauseName, tuple[str, str], np.ndarray]]:
    """What a differing element can show: the cause, what each side has there, and where."""
    yield "NaN payload", ("has NaN", "has NaN of other bits"), is_nan(a) & is_nan(b)
    zero_a, zero_b = ((magnitudes(side) == 0) & ~is_nan(side) for side in (a, b))
    yield "signed zero", ("has a zero", "has one of the other sign"), zero_a & zero_b
    yield "flushed subnormals", ("has zero", "has subnormals"), zero_a & is_subnormal(b)
    yield "flushed subnormals", ("has subnormals", "has zero"), is_subnormal(a) & zero_b
    for finite, beyond, is_swapped in ((a, b, False), (b, a, True)):
        at_max = _not_finite(beyond) & _at_one_maximum(finite, _not_finite(beyond))
        sides = "has ±max", "has inf or NaN"
        yield "saturation", sides[::-1] if is_swapped else sides, at_max


def _not_finite(x: Array) -> np.ndarray:
    return is_nan(x) | is_infinite(x)


def _at_one_maximum(x: Array, where: np.ndarray) -> np.ndarray:
    """Where values are ±max, of their dtype or of some format; nowhere if there are two different magnitudes."""
    found = np.unique(np.abs(widened(x[where])))
    if found.size != 1 or float(found[0]) not in _maxima() | {float(ml_dtypes.finfo(x.dtype).max)}:
        return np.zeros(x.shape, bool)
    return np.abs(widened(x)) == found[0]


@lru_cache(maxsize=1)
def _maxima() -> frozenset[float]:
    """Of the formats that one casts to: not the grids and scales whose max is a small number like any other."""
    return frozenset(
        each.max_representable_value for each in FORMAT_REGISTRY.values() if each.max_representable_value > 8
    )


def _by_grid(a: Array, b: Array) -> Cause | None:
    """Promotion, where one side lies on the grid of a narrower dtype and the other does not, but near by."""
    if a.size < _ENOUGH or np.any(_not_finite(a) | _not_finite(b)):
        return None
    for narrow in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)):
        if narrow.itemsize >= a.dtype.itemsize:
            continue
        on_a, on_b = (same_values(widened(rounded(widened(side), narrow)).astype(a.dtype), side) for side in (a, b))
        steps = ulps_between(rounded(widened(a), narrow), rounded(widened(b), narrow))
        if on_a != on_b and int(steps.max()) <= _STEPS_APART:
            values = narrow.name, a.dtype.name
            sides = f"has {values[not on_a]} values", f"has {values[not on_b]} values"
            return Cause(("dtype promotion",), sides, a.size)
    return None
