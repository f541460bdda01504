"""The casts of a layer, from what a rule says and from the shapes that the layer has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from altgrad_core.errors import InputError
from altgrad_core.hashing import check_word
from altgrad_core.rules import CastSpec, LayerSpec, Operand
from altgrad_core.scaling import Granularity, PerBlock, PerChannel, PerTensor, checked_axes
from altgrad_jax.nn.cast_state import CastState, begun_anew, scaling_of, seeds_of
from altgrad_jax.nn.hooks import ProductCasts
from altgrad_jax.scaling import Delayed


@dataclass(frozen=True)
class Site:
    """One product of a layer, as far as casts need to know it.

    Attributes:
        path: of the layer, for messages.
        kind: what the layer is, for messages.
        weights: float array with the axes of a stack before its own; None where both operands are activations.
        stack: how many layers are stacked in the weights, along their first axes.
        outputs: axes of one layer's weights along which outputs lie: those of channels.
        summed: the axis of one layer's weights along which blocks lie; None if it is not known.
        features: length of the last axis of the activations and of the result; None where it is not fixed.
        takes: which operands there are; embeddings have no activations to cast.
    """

    path: str
    kind: str
    weights: jax.Array | None
    stack: tuple[int, ...] = ()
    outputs: tuple[int, ...] = (-1,)
    summed: int | None = -2
    features: tuple[int | None, int | None] = (None, None)
    takes: tuple[Operand, ...] = ("activations", "weights", "gradients")

    @classmethod
    def of_einsum(cls, path: str, equation: str | None, weights: jax.Array, axes: int) -> Site:
        """The product of an Einsum layer.

        Args:
            path: of the layer.
            equation: such as ``btd,dhk->bthk``; None where each call has its own.
            weights: of which the last ``axes`` axes are the layer's own.
            axes: how many.
        """
        stack, shape = weights.shape[: weights.ndim - axes], weights.shape[weights.ndim - axes :]
        operands, _, result = (equation or "...,...").replace(" ", "").partition("->")
        inputs, labels = operands.split(",")
        if "..." in labels:
            return cls(path, "Einsum", weights, stack, summed=None)
        inputs, result = inputs.replace("...", ""), result.replace("...", "")
        sizes = dict(zip(labels, shape, strict=True))
        summed = [axis for axis, label in enumerate(labels) if label not in result]
        return cls(
            path,
            "Einsum",
            weights,
            stack,
            outputs=tuple(axis for axis, label in enumerate(labels) if label in result and label not in inputs),
            summed=summed[-1] if summed else None,
            features=(sizes.get(inputs[-1:]), sizes.get(result[-1:])),
        )

    def casts(self, spec: LayerSpec, numbers: Numbers) -> ProductCasts:
        """The casts of the product.

        Raises:
            InputError: for an option that the layer cannot honour.
        """
        made = {place: self._cast(place, self.spec_at(place, spec), numbers) for place in self.takes}
        return ProductCasts(
            activations=made.get("activations"),
            weights=made.get("weights"),
            gradients=made.get("gradients"),
            accumulate=spec.accumulate,
        )

    def operand_at(self, place: Operand) -> Operand:
        """What is cast in a place of the product: activations in that of weights, where there are none."""
        return "activations" if place == "weights" and self.weights is None else place

    def spec_at(self, place: Operand, spec: LayerSpec) -> CastSpec | None:
        """How it is cast."""
        found: CastSpec | None = getattr(spec, self.operand_at(place))
        return found

    def _cast(self, place: Operand, spec: CastSpec | None, numbers: Numbers) -> CastState | None:
        if spec is None:
            return None
        operand = self.operand_at(place)
        of_weights = operand == "weights"
        granularity = self._granularity(spec, of_weights)
        shape = self._amax_shape(operand, granularity, of_weights) if _keeps_history(spec) else ()
        one = CastState.of(spec, operand, granularity, shape)
        of_each = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*self.stack, *jnp.shape(leaf))), one)
        state = numbers.number(of_each)
        if not (of_weights and self.weights is not None):
            return state
        begin = begun_anew
        for _ in self.stack:
            begin = jax.vmap(begin)
        return begin(state, self.weights)

    def _granularity(self, spec: CastSpec, of_weights: bool) -> Granularity:
        if spec.granularity == "channel":
            return PerChannel(self.outputs if of_weights else -1)
        granularity = spec.granularity
        if of_weights and isinstance(granularity, PerBlock) and granularity.axis == -1:
            if self.summed is None:
                raise InputError(
                    f"{self.path}, a {self.kind}, does not say which axis of its weights is summed over; expected a "
                    "PerBlock with an axis"
                )
            return replace(granularity, axis=self.summed)
        return granularity

    def _amax_shape(self, operand: Operand, granularity: Granularity, of_weights: bool) -> tuple[int, ...]:
        """The shape of a row of the history."""
        if isinstance(granularity, PerTensor):
            return ()
        if of_weights and self.weights is not None and isinstance(granularity, PerChannel):
            shape = self.weights.shape[len(self.stack) :]
            kept = checked_axes(granularity.axes, len(shape))
            return tuple(size if axis in kept else 1 for axis, size in enumerate(shape))
        features = self.features[1 if operand == "gradients" else 0]
        if granularity != PerChannel(-1) or features is None:
            raise InputError(
                f"{self.path}, a {self.kind}, has no fixed number of amaxes for {operand} under {granularity}, so they "
                "have no history; expected granularity='tensor', or scaling=Current()"
            )
        return (features,)


def castable(sites: Iterable[Site]) -> set[Operand]:
    """What the products of a layer can cast."""
    return {site.operand_at(place) for site in sites for place in site.takes}


@dataclass
class Numbers:
    """Numbers the casts of a model, and gives each a seed of its own.

    Attributes:
        total: how many there will be, a stack of them counted as one.
        seed: of stochastic rounding.
        taken: how many have a number.
        seeded: how many have a seed, all those of stacks counted.
    """

    total: int
    seed: int
    taken: int = 0
    seeded: int = 0

    @classmethod
    def of(cls, products: Sequence[tuple[Site, LayerSpec]], seed: int | None) -> Numbers:
        """Those that the products of a model need.

        Raises:
            InputError: for a seed, if nothing rounds stochastically, and for one that is no uint32.
        """
        casts = [
            cast
            for site, spec in products
            for operand in site.takes
            if (cast := site.spec_at(operand, spec)) is not None
        ]
        if seed is not None:
            check_seed(seed, casts)
        return cls(len(casts), seed or 0)

    def number(self, state: CastState) -> CastState:
        """A state, or a stack of them, as the next."""
        stack = state.words.shape[:-1]
        numbered = state.numbered(self.taken, self.total, seeds_of(self.seed, self.seeded, stack))
        self.taken, self.seeded = self.taken + 1, self.seeded + math.prod(stack)
        return numbered


def check_seed(seed: int, casts: Iterable[CastSpec]) -> None:
    """Refuse a seed that is no uint32, and any if nothing rounds stochastically.

    Raises:
        InputError: naming the seed.
    """
    check_word("seed", seed)
    if all(cast.rounding != "stochastic" for cast in casts):
        raise InputError(f"seed={seed} would have no effect: no rule says rounding='stochastic'")


def _keeps_history(spec: CastSpec) -> bool:
    return isinstance(scaling_of(spec), Delayed)
