"""Exact convolutions that can be differentiated: products of patches and kernels, forward and backward.

``altgrad_torch/nn/convolution.py`` does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.convolution import Sweep, spread
from altgrad_core.errors import InputError
from altgrad_jax.axes import with_split_result
from altgrad_jax.exact import exact_dot_general

PADDINGS_OF_INPUT = ("CIRCULAR", "REFLECT")
"""Those of Flax that repeat the input, or add up the result: sums of what was rounded, which are not exact."""

_Sweeps: TypeAlias = tuple[Sweep, ...]


def exact_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: tuple[str, str, str] | lax.ConvDimensionNumbers | None = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
) -> jax.Array:
    """A stand-in for ``lax.conv_general_dilated`` whose result and both gradients are exact sums, rounded once.

    They are products of patches and kernels, see :func:`altgrad_jax.exact_dot_general`; patches take as much memory as
    the result for each element of a kernel. The gradient of the input is the convolution of the gradient with the
    flipped kernel, that of the kernel the one of input and gradient: no sum is left in float32. Zeros that pad or
    dilate take part, so that infinities in a kernel make NaN of them. In reverse mode, of any order.

    Args:
        lhs: float32, bfloat16 or float16, of any values.
        rhs: likewise, the kernel.
        window_strides: as of ``lax.conv_general_dilated``, as is what follows.
        padding: or its name.
        lhs_dilation: of the input.
        rhs_dilation: of the kernel.
        dimension_numbers: which axes are which.
        feature_group_count: groups of features.
        batch_group_count: 1.
        precision: whatever is asked for, this is no less.
        preferred_element_type: dtype of the result; that of the operands by default.
        out_sharding: how the result is to be sharded, under a mesh of explicit axes.

    Raises:
        TypeError: for operands of other dtypes, float64 among them; and in forward mode.
        InputError: for groups of batches, a kernel that does not fit into what it goes over, features that do not fit
            the kernel, and a padding by name of a dilated input.
        ValueError: for shapes that do not match.

    >>> x = jnp.array([[[2.0**64, 1.0, -(2.0**64), 3.0]]])
    >>> exact_convolution(x, jnp.ones((1, 1, 3)), (1,), "SAME").tolist()
    [[[1.8446744073709552e+19, 1.0, -1.8446744073709552e+19, -1.8446744073709552e+19]]]
    """
    axes = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    if batch_group_count != 1:
        raise InputError(f"batch_group_count is {batch_group_count}; expected 1 for exact sums")
    convolved = partial(_convolved, axes, window_strides, padding, lhs_dilation, rhs_dilation, feature_group_count)
    plain = partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
    )
    result = with_split_result(convolved, plain, out_sharding, lhs, rhs)
    return result.astype(preferred_element_type or jnp.result_type(lhs, rhs))


def _convolved(
    axes: lax.ConvDimensionNumbers,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    groups: int,
    lhs: jax.Array,
    rhs: jax.Array,
) -> jax.Array:
    """:func:`exact_convolution` as float32."""
    x, kernel = jnp.transpose(lhs, axes.lhs_spec), jnp.transpose(rhs, axes.rhs_spec)
    rank = lhs.ndim - 2
    if x.shape[1] != kernel.shape[1] * groups or kernel.shape[0] % groups:
        raise InputError(f"{groups} groups of {x.shape[1]} features do not fit a kernel of {kernel.shape[:2]}")
    spacings = tuple(rhs_dilation or (1,) * rank)
    if isinstance(padding, str):
        if set(lhs_dilation or ()) - {1}:
            raise InputError(f"padding is {padding!r} for a dilated input; expected zeros before and after, as numbers")
        windows = [spread(size, spacing) for size, spacing in zip(kernel.shape[2:], spacings, strict=True)]
        padding = lax.padtype_to_pads(x.shape[2:], windows, window_strides, padding)
    sweeps = tuple(
        Sweep(stride, before, after, dilation, spacing)
        for stride, (before, after), dilation, spacing in zip(
            window_strides, padding, lhs_dilation or (1,) * rank, spacings, strict=True
        )
    )
    grouped = jnp.moveaxis(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), 1, 0)
    result = jnp.moveaxis(_convolution(sweeps, grouped, kernel.reshape(groups, -1, *kernel.shape[1:])), 0, 1)
    result = result.reshape(result.shape[0], -1, *result.shape[3:])
    return jnp.transpose(result, np.argsort(axes.out_spec).tolist())


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(sweeps: _Sweeps, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Of ``(groups, batch, inputs, *sizes)`` and ``(groups, outputs, inputs, *sizes)``: float32 as the first."""
    lengths = kernel.shape[3:]
    in_patches = tuple(4 + 2 * axis for axis in range(len(sweeps)))
    contracted = (2, *in_patches), (2, *range(3, kernel.ndim))
    product = exact_dot_general(_patches(sweeps, x, lengths), kernel, (contracted, ((0,), (0,))))
    return jnp.moveaxis(product, -1, 2)


def _patches(sweeps: _Sweeps, x: jax.Array, kernel: tuple[int, ...]) -> jax.Array:
    """What the kernel meets: ``(groups, batch, inputs, p, k, ...)``, an axis of the kernel behind each of places."""
    lengths = [sweep.length(*sizes) for sweep, *sizes in zip(sweeps, x.shape[3:], kernel, strict=True)]
    edges = [(sweep.before, sweep.after, sweep.dilation - 1) for sweep in sweeps]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * 3 + edges)
    for axis, (sweep, places, size) in enumerate(zip(sweeps, lengths, kernel, strict=True)):
        met = np.arange(places)[:, None] * sweep.stride + np.arange(size) * sweep.spacing
        x = jnp.take(x, met, axis=3 + 2 * axis, mode="clip")
    return x


def _forward(sweeps: _Sweeps, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolution(sweeps, x, kernel), (x, kernel)


def _backward(
    sweeps: _Sweeps, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = operands
    sizes = list(zip(sweeps, x.shape[3:], kernel.shape[3:], strict=True))
    to_input = tuple(sweep.to_input(size, length) for sweep, size, length in sizes)
    to_kernel = tuple(sweep.to_kernel(size, length) for sweep, size, length in sizes)
    flipped = jnp.flip(kernel, range(3, kernel.ndim)).swapaxes(1, 2)
    of_x = _convolution(to_input, gradient, flipped)
    of_kernel = _convolution(to_kernel, x.swapaxes(1, 2), gradient.swapaxes(1, 2)).swapaxes(1, 2)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


_convolution.defvjp(_forward, _backward)
