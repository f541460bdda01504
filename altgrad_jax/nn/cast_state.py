"""All that the cast of an operand carries from step to step: format, rounding, scale and history, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from altgrad_core.errors import InputError
from altgrad_core.formats import ROUNDINGS, CastPath
from altgrad_core.rules import DEFAULT_WINDOW, CastSpec, Operand, check_serves
from altgrad_core.scaling import Granularity, PerBlock, PerTensor
from altgrad_jax.addition import BY_ADDITION, FIXED, Addition
from altgrad_jax.granularity import amaxes
from altgrad_jax.nn.record import Shape
from altgrad_jax.params import WORDS, Edges, FormatHolder, FormatParams, edges, from_words, to_words
from altgrad_jax.scaling import Current, Delayed, Scaling, Static, push_amax

_STOCHASTIC = ROUNDINGS.index("stochastic")
_PLACE = WORDS + len(FIXED)
_STEP, _GRID = _PLACE + 2, _PLACE + 3
"""Behind the params and what no scale changes of a grid: the place in a stack and the seed, the step, what else the
next cast needs of its grid, and the history."""
_GRID_WORDS: Mapping[CastPath, int] = {"fast": 6, "wide": 7, "integer": 5}
"""A number for each path, so that the state of a cast by another has another shape."""

_GOLDEN = 0x9E3779B9
"""2^32 over the golden ratio, odd: multiples of it are far apart, so neighbouring casts start from unlike seeds."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CastState(FormatHolder):
    """How one operand of a layer is cast, and what was seen of it: a pytree, to be carried like any other state.

    All that is data is in one array, since a jitted step takes longer to hand a hundred scalars in and out than a small
    model to compute; only what :class:`~altgrad_jax.scaling.Static` scales by is apart. In a model whose layers are
    stacked, to be scanned over, the arrays have the leading axes of the stack.

    Attributes:
        words: int32 ``(20 + window * amaxes,)``, on the wide path one more, on the integer path one less: the params,
            as :func:`~altgrad_jax.params.to_words` writes them, what of their grid is the same under all scales, the
            place in the stack, seed, step, the rest of the grid of the next cast, and the bits of the history.
        scaling: where scales come from.
        path: which implementation casts (static).
        amax_shape: the shape of what has a scale of its own, such as ``()`` (static).
        granularity: which elements share a scale (static).
        operand: what is cast (static).
        number: which of the model's casts it is (static).
        total: how many the model has, a stack of them counted as one; 0 for a cast of no model (static).
        stack: leading axes of the arrays, where layers are stacked (static).
    """

    words: jax.Array
    scaling: Scaling
    path: CastPath = field(metadata={"static": True})
    amax_shape: tuple[int, ...] = field(metadata={"static": True})
    granularity: Granularity = field(metadata={"static": True})
    operand: Operand = field(metadata={"static": True})
    number: int = field(default=0, metadata={"static": True})
    total: int = field(default=0, metadata={"static": True})
    stack: tuple[int, ...] = field(default=(), metadata={"static": True})

    @classmethod
    def of(
        cls,
        spec: CastSpec,
        operand: Operand,
        granularity: Granularity,
        amax_shape: tuple[int, ...] = (),
    ) -> CastState:
        """The state before the first step, of a cast of no model yet.

        Args:
            spec: what a rule says.
            operand: what is cast.
            granularity: that of the spec, with the axes of this operand.
            amax_shape: shape of what shares no scale, such as ``()`` or ``(features,)``.

        Raises:
            InputError: for scaling that is none, or that cannot serve the granularity.
        """
        params = FormatParams.from_format(spec.format, rounding=spec.rounding, overflow=spec.overflow)
        return cls._before_steps(params, scaling_of(spec), operand, granularity, amax_shape)

    @classmethod
    def without_history(
        cls, params: FormatParams, scaling: Static | Current, operand: Operand, granularity: Granularity
    ) -> CastState:
        """The state of a cast that nothing is carried for from step to step.

        Raises:
            InputError: for delayed scales and stochastic rounding, which need a history and a step, for scales that do
                not suit the granularity, and for a format without a sign or that casts nothing.
        """
        if isinstance(scaling, Delayed):
            raise InputError(f"scaling={scaling!r} needs a state; expected Static or Current, or quantize_model")
        if not isinstance(scaling, Static | Current):
            raise InputError(f"scaling is {scaling!r}; expected Static or Current of altgrad_jax")
        _check_serves(scaling, granularity)
        if params.path in ("unsigned", "identity"):
            what = "has no sign and no zero" if params.path == "unsigned" else "is float32, which casts nothing"
            raise InputError(f"the format {what}; expected a signed one of at most 16 bits")
        if not isinstance(params.rounding, jax.core.Tracer) and np.any(np.asarray(params.rounding) == _STOCHASTIC):
            raise InputError("rounding='stochastic' needs a step to draw by; expected another, or quantize_model")
        return cls._before_steps(params, scaling, operand, granularity, ())

    @classmethod
    def _before_steps(
        cls,
        params: FormatParams,
        scaling: Scaling,
        operand: Operand,
        granularity: Granularity,
        amax_shape: tuple[int, ...],
    ) -> CastState:
        others = jnp.zeros(_words_in_all(params.path, scaling, amax_shape) - _PLACE, jnp.int32)
        words = jnp.concatenate([_words_of(params), others])
        return cls(words, scaling, params.path, amax_shape, granularity, operand)._with_grid()

    def numbered(self, number: int, total: int, seeds: np.ndarray) -> CastState:
        """The state as one of a model, or as a stack of such.

        Args:
            number: which it is.
            total: of how many.
            seeds: uint32, of stochastic rounding; of the shape of the stack.
        """
        stack = self.words.shape[:-1]
        places = np.arange(math.prod(stack), dtype=np.int32).reshape(stack)
        numbers = np.stack([places, seeds.view(np.int32)], axis=-1)
        words = self.words.at[..., _PLACE:_STEP].set(numbers)
        return replace(self, words=words, number=number, total=total, stack=stack)

    @property
    def params(self) -> FormatParams:
        """Format, rounding and overflow policy."""
        return from_words(self.words[..., :WORDS], self.path)

    def with_params(self, params: FormatParams) -> CastState:
        """The state with another format of the same path; its array lies where it lay."""
        words = jnp.concatenate([_words_of(params), self.words[..., _PLACE:]], axis=-1)
        after, old = replace(self, words=words)._with_grid(), self.words
        if not isinstance(old, jax.Array) or isinstance(old, jax.core.Tracer) or not old.committed:
            return after  # of a NumPy array, as checkpoints are read into, there is no place to keep
        return replace(after, words=_placement(old.sharding)(after.words))

    @property
    def place(self) -> jax.Array | None:
        """int32, which of a stack it is; None for one alone."""
        return self.words[..., _PLACE] if self.stack else None

    @property
    def seed(self) -> jax.Array:
        """uint32, of stochastic rounding."""
        return lax.bitcast_convert_type(self.words[..., _PLACE + 1], jnp.uint32)

    @property
    def step(self) -> jax.Array:
        """uint32, recordings so far: another step, other random bits."""
        return lax.bitcast_convert_type(self.words[..., _STEP], jnp.uint32)

    @property
    def history(self) -> jax.Array | None:
        """float32 ``(window, *amax)``, the amaxes of earlier steps; None unless scales are delayed."""
        if not isinstance(self.scaling, Delayed):
            return None
        shape = *self.words.shape[:-1], self.scaling.window, *self.amax_shape
        return lax.bitcast_convert_type(self.words[..., _history_at(self.path) :], jnp.float32).reshape(shape)

    @property
    def writes_amaxes(self) -> bool:
        """Whether there is more to record of an amax than the largest of all."""
        return isinstance(self.scaling, Delayed) and not isinstance(self.granularity, PerTensor)

    @property
    def shape(self) -> Shape:
        """Of what it writes to."""
        return Shape(math.prod(self.stack) if self.stack else None, self.amax_shape if self.writes_amaxes else None)

    def with_history(self, history: jax.Array | None, step: jax.Array) -> CastState:
        """The state with another history, and at another step.

        Args:
            history: of the shape of this one.
            step: uint32.
        """
        grid = self.words[..., _GRID : _history_at(self.path)]
        parts = [self.words[..., :_STEP], _as_words(step)[..., None], grid]
        if history is not None:
            parts.append(_as_words(history).reshape(*self.words.shape[:-1], -1))
        return replace(self, words=jnp.concatenate(parts, axis=-1))._with_grid()

    @property
    def has_grid(self) -> bool:
        """Whether all of a tensor is cast on one grid that is known before: that of the params, scaled."""
        return isinstance(self.scaling, Delayed) and self.scaling.power_of_two and not self.writes_amaxes

    @property
    def grid(self) -> tuple[FormatParams | Addition, Edges]:
        """What the next cast rounds to and where that ends, if known before: worked out when the history changed."""
        overflows, vanishes, *numbers = (_word(self.words, k) for k in range(_GRID, _history_at(self.path)))
        limits = Edges(overflows, vanishes)
        if self.path in BY_ADDITION:
            fixed = (_word(self.words, WORDS + k) for k in range(len(FIXED)))
            return Addition.put_together(fixed, numbers, limits), limits
        minimum, maximum, native = numbers
        return replace(self.params, min_exponent=minimum, max_value=_as_floats(maximum), native_overflow=native), limits

    def _with_grid(self) -> CastState:
        """The state whose grid is that of its params and history."""
        if not self.has_grid:
            return self
        return replace(self, words=_words_with_grid(self.anonymous()))

    def check(self) -> None:
        """Refuse words that belong to a cast by another path, or by another window: read, they would be nonsense.

        Raises:
            InputError: saying where they may come from.
        """
        found, expected = self.words.shape[-1], _words_in_all(self.path, self.scaling, self.amax_shape)
        if found != expected:
            raise InputError(
                f"the state of a cast by the {self.path} path has {expected} words, and this has {found}; expected the "
                "state of a model by the same rules, whose formats and roundings take the same path"
            )

    def anonymous(self) -> CastState:
        """The state of whichever cast: those that differ in data alone share what JAX traces of them."""
        return replace(self, operand="activations", number=0, total=0, stack=())

    def updated(self, seen: jax.Array, largest: jax.Array) -> CastState:
        """The state after a step; of one layer, where layers are stacked.

        Args:
            seen: bool scalar, whether the cast took place.
            largest: float32, the amaxes, of the shape of a row of the history.
        """
        if self.has_grid:
            return replace(self, words=_words_after(self.anonymous(), seen, largest))
        history = self.history
        if history is not None:
            history = jnp.where(seen, push_amax(history, largest.reshape(self.amax_shape)), history)
        return self.with_history(history, self.step + 1)


@cache  # a jit of its own for each array would compile as often
def _placement(sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    """Puts an array where it should lie: as ``device_put``, which on several processes first compares their values."""
    return jax.jit(lambda words: words, out_shardings=sharding)


@partial(jax.jit, inline=True)  # one program also outside of jit
def _words_with_grid(state: CastState) -> jax.Array:
    scaling, history = state.scaling, state.history
    assert isinstance(scaling, Delayed)
    assert history is not None
    counting = history[..., -1] if scaling.reduce == "most_recent" else jnp.max(history, axis=-1)
    return _with_columns(state.words, _GRID, _moving(state, counting))


def _words_after(state: CastState, seen: jax.Array, largest: jax.Array) -> jax.Array:
    """The words of a state with a grid after a step, whose amax is entered if it was seen.

    As :func:`~altgrad_jax.scaling.push_amax` and :func:`_words_with_grid` one after the other, in the two kernels that
    there must be: by these it would be six to compile.
    """
    words, scaling = state.words, state.scaling
    assert isinstance(scaling, Delayed)
    which, history = lax.broadcasted_iota(jnp.int32, words.shape, words.ndim - 1), _history_at(state.path)
    last = words[..., -1]
    newest = jnp.where(jnp.isfinite(largest), _as_words(largest), last)
    left = jnp.where(which == words.shape[-1] - 1, newest[..., None], _moved_left(words))
    after = jnp.where((which >= history) & seen[..., None], left, words) + (which == _STEP)
    # Bits of magnitudes are in the order of these.
    others = jnp.max(words[..., history + 1 :], axis=-1, initial=0)
    pushed, not_pushed = jnp.maximum(others, newest), jnp.maximum(others, words[..., history])
    if scaling.reduce == "most_recent":
        pushed, not_pushed = newest, last
    return _with_columns(after, _GRID, _moving(state, _as_floats(jnp.where(seen, pushed, not_pushed))))


def _moved_left(words: jax.Array) -> jax.Array:
    return lax.pad(words, np.int32(0), [(0, 0, 0)] * (words.ndim - 1) + [(-1, 1, 0)])


def _moving(state: CastState, counting: jax.Array) -> Sequence[jax.Array]:
    """What of a grid hangs on its scale, which comes from the amax that counts."""
    scaling, params = state.scaling, state.params
    assert isinstance(scaling, Delayed)
    scaled = params.scaled(scaling.scale(0, params.max_value, counting[None]))
    limits = edges(scaled)
    if state.path in BY_ADDITION:
        return *limits, *Addition.of(scaled, limits).moving
    return *limits, scaled.min_exponent, _as_words(scaled.max_value), scaled.native_overflow


def _with_columns(words: jax.Array, first: int, columns: Sequence[jax.Array]) -> jax.Array:
    """Words of which some, one after the other, are others.

    Chosen element by element, in one kernel: put side by side they would be a kernel each to compile.
    """
    which = lax.broadcasted_iota(jnp.int32, words.shape, words.ndim - 1)
    for k, column in enumerate(columns, first):
        words = jnp.where(which == k, column[..., None], words)
    return words


def _words_of(params: FormatParams) -> jax.Array:
    """What of the words hangs on the format alone."""
    if params.path not in BY_ADDITION:
        return jnp.pad(to_words(params), [(0, 0)] * params.max_value.ndim + [(0, len(FIXED))])
    fixed = jnp.stack(Addition.of(params, edges(params)).fixed, axis=-1)
    return jnp.concatenate([to_words(params), fixed], axis=-1)


def scale_of(state: CastState, own: jax.Array | None) -> jax.Array:
    """The scales that a cast goes by.

    Args:
        state: of the cast.
        own: the tensor's own amaxes, as :func:`~altgrad_jax.granularity.amaxes` gives them; needed by current scales.

    Returns:
        float32: a scalar where all elements share one, else of a shape that :func:`~altgrad_jax.granularity.spread`
        takes.
    """
    match state.scaling:
        case Current() as current if own is not None:
            return current.scale(own if own.size > 1 else own.reshape(()), state.params.max_value)
        case Delayed() as delayed if state.history is not None:
            return delayed.scale(0, state.params.max_value, state.history)
        case Static() as static:
            return static.scale(0, state.params.max_value)
        case _:
            raise AssertionError(f"{state.scaling} without what it scales by")


def seeds_of(seed: int, first: int, stack: tuple[int, ...]) -> np.ndarray:
    """Seeds of stochastic rounding, unlike for each cast of a model: uint32, of the shape of the stack.

    Args:
        seed: of the whole model.
        first: how many casts come before, all those of stacks counted.
        stack: of casts.
    """
    places = first + np.arange(math.prod(stack), dtype=np.uint64).reshape(stack)
    return np.asarray((seed + places * _GOLDEN) % 2**32).astype(np.uint32)


def _history_at(path: CastPath) -> int:
    return _GRID + _GRID_WORDS[path]


def _words_in_all(path: CastPath, scaling: Scaling, amax_shape: tuple[int, ...]) -> int:
    window = scaling.window if isinstance(scaling, Delayed) else 0
    return _history_at(path) + window * math.prod(amax_shape)


def _word(words: jax.Array, k: int) -> jax.Array:
    return lax.index_in_dim(words, k, axis=-1, keepdims=False)


def _as_words(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _as_floats(words: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(words, jnp.float32)


def scaling_of(spec: CastSpec) -> Scaling:
    """Where the scales of a cast come from: delayed by default, of blocks current.

    Raises:
        InputError: for what is no scaling of this framework, and for one that cannot serve blocks.
    """
    scaling = spec.scaling
    if scaling is None:
        return Current() if isinstance(spec.granularity, PerBlock) else Delayed(DEFAULT_WINDOW)
    if not isinstance(scaling, Scaling):
        raise InputError(f"scaling is {scaling!r}; expected a Static, Current or Delayed of altgrad_jax")
    _check_serves(scaling, spec.granularity)
    return (
        Static(jnp.asarray(scaling.value, jnp.float32), scaling.power_of_two)
        if isinstance(scaling, Static)
        else scaling
    )


def _check_serves(scaling: Scaling, granularity: object) -> None:
    static = np.shape(scaling.value) if isinstance(scaling, Static) else None
    check_serves(scaling, granularity, isinstance(scaling, Current), static)


def begun_anew(state: CastState, x: jax.Array) -> CastState:
    """The state whose history begins with the amax of ``x``: of a weight, which is known before any step."""
    if state.history is None:
        return state
    largest = amaxes(x, state.granularity).reshape(state.amax_shape)
    return state.with_history(push_amax(jnp.zeros_like(state.history), largest), state.step)
