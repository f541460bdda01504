"""Axes of devices: whether an array is split over some, and sums over mapped ones of parts and of what is whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import auto_axes

AxisName = Hashable | Sequence[Hashable]
"""The name of a mapped axis, or several."""

Value = TypeVar("Value")
"""Any pytree of arrays."""


def axes_of(leaf: jax.Array, axis_name: AxisName | None) -> tuple[Hashable, ...]:
    """Of the axes named, those over which a leaf is a part of a larger one.

    Inside ``shard_map`` types say over which axes a value varies; over the others every place holds all of it. Where
    nothing is said, under ``vmap`` and with ``check_vma=False``, every leaf is a part over all axes.

    Args:
        leaf: as one place sees it.
        axis_name: axes of ``shard_map`` or ``vmap``; None for none.

    Returns:
        Their names, in the order given.

    >>> import numpy as np
    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    >>> def look(part, whole):
    ...     print(axes_of(part, "data"), axes_of(whole, "data"))
    ...     return part
    >>> spec = jax.sharding.PartitionSpec
    >>> seen = jax.shard_map(look, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec("data"))(*np.ones((2, 4)))
    ('data',) ()
    """
    varying = _varying(leaf)
    return tuple(name for name in _names(axis_name) if name in varying or not _is_typed(name))


def by_axes(leaves: Sequence[jax.Array], axis_name: AxisName | None) -> dict[tuple[Hashable, ...], list[int]]:
    """The places, in a sequence of leaves, of those that go together: by what :func:`axes_of` says of them."""
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault(axes_of(leaf, axis_name), []).append(index)
    return groups


def is_split(leaf: jax.Array) -> bool:
    """Whether an array's type says that it is split over axes of a mesh, as it does of explicit axes alone."""
    return any(axis is not None for axis in jax.typeof(leaf).sharding.spec)


def is_whole(leaf: jax.Array) -> bool:
    """Whether an array is known to lie on one device. To flatten one that does not is to gather it, or an error."""
    return jax.device_count() == 1 and not is_split(leaf)


def places_along(x: jax.Array, axis: int) -> int:
    """How many places of a mesh an array's type says that an axis is split over; 1 for none."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis]
    return math.prod(sharding.mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,)) if name)


def whole_along(x: jax.Array, axis: int) -> jax.Array:
    """The array, its axis no longer split over explicit axes of a mesh."""
    if places_along(x, axis) == 1:
        return x
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec(*spec[:axis], None, *spec[axis + 1 :]))


def split_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """The array, split over explicit axes of a mesh as another one of its shape is."""
    wanted = jax.typeof(like).sharding
    if not (is_split(x) or is_split(like)) or jax.typeof(x).sharding == wanted:
        return x
    return jax.sharding.reshard(x, wanted)


def with_split_result(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    plain: Callable[..., jax.Array],
    out_sharding: jax.sharding.Sharding | jax.sharding.PartitionSpec | None,
    lhs: jax.Array,
    rhs: jax.Array,
) -> jax.Array:
    """``function(lhs, rhs)``, of many steps: how those are split is for XLA to find out, only the result is told.

    Args:
        function: what is computed.
        plain: one of JAX's own, whose result is split as this one is to be.
        out_sharding: as of JAX's own functions, under explicit axes of a mesh.
        lhs: an operand.
        rhs: the other one.
    """
    if out_sharding is None and not (is_split(lhs) or is_split(rhs)):
        return function(lhs, rhs)
    if out_sharding is None:
        out_sharding = jax.eval_shape(plain, lhs, rhs).sharding
    by_xla = cast("Callable[[jax.Array, jax.Array], jax.Array]", auto_axes(function, out_sharding=out_sharding))
    return by_xla(lhs, rhs)


def sum_over(value: jax.Array, axes: tuple[Hashable, ...]) -> jax.Array:
    """The sum over mapped axes; the value itself over none."""
    return lax.psum(value, axes) if axes else value


def largest_over(amaxes: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The largest of amaxes, float32 of any shape, over mapped axes. As integers: a float maximum may lose a NaN."""
    if axis_name is None:
        return amaxes
    bits = lax.pmax(lax.bitcast_convert_type(amaxes, jnp.int32), axis_name)
    return lax.bitcast_convert_type(bits, jnp.float32)


def varying_as(value: Value, leaves: Sequence[jax.Array], axis_name: AxisName | None) -> Value:
    """A constant that by its type varies as sums of leaves over the axes do: over what is left of the leaves' own axes.

    For a branch that returns it where the other branch returns such a sum.
    """
    axes = frozenset().union(*map(_varying, leaves)) - set(_names(axis_name))
    return jax.tree.map(lambda x: lax.pcast(x, tuple(axes), to="varying"), value) if axes else value


def places(axis_name: AxisName | None) -> int:
    """How many places the axes have, all of them together."""
    names = _names(axis_name)
    return lax.axis_size(names) if names else 1


def _names(axis_name: AxisName | None) -> tuple[Hashable, ...]:
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def _is_typed(name: Hashable) -> bool:
    """Whether types tell what varies over an axis: the index on it does."""
    return name in _varying(lax.axis_index(name))


def _varying(x: jax.Array) -> frozenset[Hashable]:
    # JAX names it in one way up to 0.9 and in another since.
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying
