"""What is stored of a model, of NNX or Linen: its arrays by name, the weights that layers cast packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from altgrad_core.cast_options import check_options
from altgrad_core.errors import InputError, naming
from altgrad_core.formats import Format
from altgrad_core.packing import PackedLayout, check_cast_alike, check_same_names
from altgrad_core.scaling import Granularity, PerBlock, PerChannel, PerTensor, checked_axes, checked_axis
from altgrad_jax.granularity import amaxes
from altgrad_jax.nn.cast_arrays import arrays_of, grid_of, is_of_a_cast, loaded, options_of
from altgrad_jax.nn.cast_state import CastState, begun_anew, scale_of
from altgrad_jax.nn.casts import cast_operand
from altgrad_jax.nn.describe import format_names, formats_of
from altgrad_jax.packing import PackedTensor, pack_tensor, unpack_tensor

Tensors = Mapping[str, PackedTensor | jax.Array]
"""By names such as ``blocks/0/up/kernel``."""


@dataclass(frozen=True)
class CastWeights:
    """A parameter that a layer casts.

    Attributes:
        name: of the parameter.
        cast: of its cast.
        values: the parameter, with the axes of a stack of layers before its own.
        state: of the cast.
    """

    name: str
    cast: str
    values: jax.Array
    state: CastState

    @property
    def format(self) -> Format:
        """The one that all layers of a stack have.

        Raises:
            InputError: if they have different ones.
        """
        formats = formats_of(self.state.params)
        if formats[1:] or formats[0] is None:
            names = format_names([self.state])
            raise InputError(f"{self.name} is cast to {names}; expected one format of at most 16 bits")
        return formats[0]

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale, with the axes of a stack of layers before their own."""
        return _over_stack(self.state.granularity, len(self.state.stack), self.values.ndim)

    def packed(self, dtype: jax.typing.DTypeLike) -> PackedTensor:
        """The codes and scales that the layer computes with.

        Args:
            dtype: in which it computes, to which it takes its weights before they are cast.
        """
        stack, weights, packed_as = len(self.state.stack), self.values, self.format
        cast, scale = cast_operand, _scales
        for _ in range(stack):
            cast, scale = jax.vmap(cast), jax.vmap(scale)
        computed = weights.astype(dtype)
        with naming(self.name):
            # The values are on the grid, however they were rounded; the policy is there to refuse what has no code.
            return pack_tensor(
                cast(computed, self.state).astype(weights.dtype),
                packed_as,
                scale=scale(computed, self.state),
                granularity=self.granularity,
                overflow="saturate_finite",
            )

    def check_packed(self, layout: PackedLayout) -> None:
        """Refuse what the cast would round once more.

        Raises:
            InputError: see :func:`altgrad_core.packing.check_cast_alike`.
        """
        ndim, is_even = self.values.ndim, self.state.scaling.power_of_two
        check_cast_alike(layout, ndim, self.format, self.granularity, power_of_two=is_even)

    def begun_anew(self, weights: jax.Array) -> CastState:
        """The state whose history begins with other weights."""
        begin = begun_anew
        for _ in self.state.stack:
            begin = jax.vmap(begin)
        return begin(self.state, weights)


@dataclass(frozen=True)
class Stored:
    """What is stored of a model.

    Attributes:
        arrays: parameters and running statistics by name.
        casts: by names like ``up/casts/weights``.
        weights: the parameters that layers cast.
    """

    arrays: Mapping[str, jax.Array]
    casts: Mapping[str, CastState]
    weights: tuple[CastWeights, ...]

    def packed(self, weights: Tensors) -> dict[str, PackedTensor | jax.Array]:
        """All that is stored, with some parameters packed."""
        return {**self.arrays, **weights, **self._arrays_of_casts()}

    def unpacked(self, tensors: Tensors) -> tuple[dict[str, jax.Array], dict[str, CastState]]:
        """Arrays and casts with what was packed.

        Args:
            tensors: without those of casts, these stay, but for the histories of weights, which begin anew.

        Raises:
            InputError: for names, shapes, dtypes and formats that are not those of the model.
        """
        given, arrays = dict(tensors), self._arrays_of_casts()
        if not self.casts:
            given = {name: tensor for name, tensor in given.items() if not is_of_a_cast(name)}
        elif not any(is_of_a_cast(name) for name in given):
            arrays = {}
        held = {**self.arrays, **arrays}
        self._check_options(given)  # before the names, which it explains: no history, since scales are current
        check_same_names(held, given)
        _check_kinds(held, given)
        self._check_formats(given)
        plain = {name: tensor for name, tensor in given.items() if not isinstance(tensor, PackedTensor)}
        values = {name: _unpacked(given[name]) for name in self.arrays}
        if arrays:
            return values, {name: loaded(state, name, plain) for name, state in self.casts.items()}
        return values, {**self.casts, **{each.cast: each.begun_anew(values[each.name]) for each in self.weights}}

    def _arrays_of_casts(self) -> dict[str, jax.Array]:
        return {name: array for cast, state in self.casts.items() for name, array in arrays_of(cast, state)}

    def _check_options(self, tensors: Tensors) -> None:
        """Refuse casts that scale in another way than the model's."""
        for name, state in self.casts.items():
            options = tensors.get(f"{name}/options")
            if options is not None and not isinstance(options, PackedTensor):
                with naming(f"{name}/options"):
                    check_options(np.asarray(options).tobytes(), options_of(state))

    def _check_formats(self, tensors: Tensors) -> None:
        """Refuse weights and casts in other formats, or weights under other scales, than the model's."""
        for weights in self.weights:
            tensor = tensors[weights.name]
            if isinstance(tensor, PackedTensor):
                with naming(weights.name):
                    weights.check_packed(tensor.layout)
        for name, state in self.casts.items():
            grid = tensors.get(f"{name}/grid")
            if grid is not None and not isinstance(grid, PackedTensor) and not np.array_equal(grid, grid_of(state)):
                raise InputError(
                    f"{name}/grid is packed in another format, rounding or overflow policy; expected "
                    f"{format_names([state])}, as its layer casts"
                )


def _unpacked(tensor: PackedTensor | jax.Array) -> jax.Array:
    return unpack_tensor(tensor) if isinstance(tensor, PackedTensor) else tensor


def _scales(weights: jax.Array, state: CastState) -> jax.Array:
    """The scales of one layer's weights, with the axes of these."""
    scale = scale_of(state, amaxes(weights, state.granularity))
    return scale.reshape((1,) * (weights.ndim - scale.ndim) + scale.shape)


def _over_stack(granularity: Granularity, stack: int, ndim: int) -> Granularity:
    """The granularity of stacked weights, from that of one layer's, with its axes counted from the front."""
    own = ndim - stack
    match granularity:
        case PerTensor():
            return PerChannel(tuple(range(stack))) if stack else granularity
        case PerChannel(axes):
            return PerChannel((*range(stack), *(stack + axis for axis in checked_axes(axes, own))))
        case PerBlock(size, axis):
            return PerBlock(size, stack + checked_axis(axis, own))


def _check_kinds(held: Mapping[str, jax.Array], tensors: Tensors) -> None:
    """Refuse another shape or dtype."""
    for name, array in held.items():
        tensor = tensors[name]
        dtype = tensor.layout.dtype if isinstance(tensor, PackedTensor) else tensor.dtype.name
        found, expected = (tensor.shape, dtype), (array.shape, array.dtype.name)
        if found != expected:
            raise InputError(f"{name} has shape {found[0]} in {found[1]}; expected {expected[0]} in {expected[1]}")
