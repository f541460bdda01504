"""Anyone's model in any format: what a user calls, for Flax NNX and Linen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, overload

from flax import linen, nnx

from altgrad_core.errors import InputError
from altgrad_core.rules import Formats, Rule
from altgrad_core.summary import Summary
from altgrad_jax.nn.linen_models import (
    Quantized,
    Variables,
    dequantize_linen,
    quantize_linen,
    set_linen_formats,
    summarize_linen,
)
from altgrad_jax.nn.nnx_models import dequantize_nnx, quantize_nnx, record_nnx, set_nnx_formats, summarize_nnx
from altgrad_jax.nn.seen import Seen

Model = TypeVar("Model", bound=nnx.Module)


@overload
def quantize_model(model: Model, rules: Sequence[Rule], *, seed: int | None = None) -> Model: ...
@overload
def quantize_model(model: linen.Module, rules: Sequence[Rule], *, seed: int | None = None) -> Quantized: ...
def quantize_model(
    model: nnx.Module | linen.Module, rules: Sequence[Rule], *, seed: int | None = None
) -> nnx.Module | Quantized:
    """A model whose layers compute in the formats that rules name.

    What a layer multiplies is cast: its weights where they are used (the parameters stay as they are), what comes in,
    and the gradient that flows back. Layers that can be cast: Linear, LinearGeneral (Dense, DenseGeneral), Einsum,
    Conv, ConvTranspose, Embed (its table, and what ``attend`` is given), and the two products of attention, whose
    projections are layers of their own (``attn/query``, ...). Layers that are stacked, to be scanned over, each have
    formats and scales.

    A Linen model finds its layers in ``init``, where a rule's mistakes come out. It computes the same parameters as
    the plain model's, and a collection ``"casts"`` besides; parameters from elsewhere get theirs by
    :meth:`~altgrad_jax.nn.Quantized.with_casts`. Where modules are lifted, that collection has to be as well, with the
    layers as its first axis: ``nn.scan(..., variable_axes={"params": 0, "casts": 0})``.

    Delayed scales of weights are those of the weights from the first step on; of activations and gradients they are 1
    until something was recorded: a :func:`recording` around a pass over a batch calibrates them. So quantize a model
    that has its weights: scales do not follow others that are loaded into it later, except by recording.

    Args:
        model: of Flax NNX or Linen; it stays as it is.
        rules: the first whose pattern matches the whole path of a layer decides; what none matches stays as it is.
        seed: of stochastic rounding, where a rule asks for that; 0 by default.

    Returns:
        Of NNX a copy of the model, with the same parameters, and with :class:`CastVariable` as further state; of Linen
        a module with ``init`` and ``apply``.

    Raises:
        InputError: for an option that a layer cannot honour, and for a model that is quantized already.

    Warns:
        UnusedRuleWarning: for a rule that decides about no layer.

    >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 4, rngs=nnx.Rngs(1)))
    >>> cast = quantize_model(model, [Rule("layers/0", "E4M3", gradients="E5M2"), Rule(".*", None)])
    >>> print(summary(cast))
    layer         kind    activ.  weights  grad.  scales      rule
    ──────────────────────────────────────────────────────────────────
    layers/0      Linear  E4M3    E4M3     E5M2   delayed 16  layers/0
    layers/2      Linear  -       -        -                  -
    >>> import jax, jax.numpy as jnp
    >>> cast = quantize_model(linen.Sequential([linen.Dense(16), linen.relu, linen.Dense(4)]), [Rule(".*", "E4M3")])
    >>> sorted(jax.eval_shape(cast.init, jax.random.key(0), jnp.ones((2, 8))))
    ['casts', 'params']
    """
    if isinstance(model, linen.Module):
        return quantize_linen(model, rules, seed=seed)
    return quantize_nnx(_checked(model), rules, seed=seed)


@overload
def dequantize_model(model: Model) -> Model: ...
@overload
def dequantize_model(model: linen.Module) -> linen.Module: ...
def dequantize_model(model: nnx.Module | linen.Module) -> nnx.Module | linen.Module:
    """The plain model again, with the parameters as they are now.

    Args:
        model: from :func:`quantize_model`; it stays as it is.

    Returns:
        Of NNX a copy; of Linen the module that was quantized, to which the parameters of the variables belong.
    """
    if isinstance(model, linen.Module):
        return dequantize_linen(model)
    return dequantize_nnx(_checked(model))


def recording(model: nnx.Module, *, axis_name: str | tuple[str, ...] = ()) -> AbstractContextManager[Seen]:
    """Record what the casts of an NNX model see, and bring their scales up to date when it is over.

    Open it inside the jitted step, around the forward and the backward pass, any number of them: counts add up, and of
    amaxes the largest goes into the histories. An exception leaves the model as it was. Without it nothing is measured
    and scales stand still: that is how a model is evaluated. Stochastic rounding draws new bits with each recording;
    passes within one, and whatever computes without, draw the same. Of a Linen model the states are the user's to
    carry: see :func:`~altgrad_jax.nn.record_casts`.

    Whatever computes meanwhile is taken for this model if it has as many casts: let a teacher compute within
    :func:`~altgrad_jax.nn.not_recording`.

    Within a step ``scan``, ``checkpoint`` and ``jit`` may be used freely, and the step itself under ``vmap`` over whole
    models, each of which was quantized before they were stacked. JAX can write to no reference in a differentiated
    ``lax.cond`` (it raises a ``KeyError``), nor under a ``vmap`` over examples alone (an exception that speaks of an
    unbatched array reference): there, record elsewhere.

    Args:
        model: from :func:`quantize_model`, or a part of it, whose casts alone are then recorded.
        axis_name: inside ``shard_map``, axes over which tensors are parts: counts and amaxes are then of all of them.

    Yields:
        What was seen, to be read when the recording is over.

    Raises:
        InputError: if nothing in the model is cast, or another recording goes on; for a model of parts that were
            quantized apart; and in a backward pass that comes after the recording is over.

    >>> model = quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")])
    >>> import jax.numpy as jnp
    >>> @nnx.jit
    ... def step(model, x):
    ...     with recording(model) as seen:
    ...         loss, gradients = nnx.value_and_grad(lambda model: model(x).sum())(model)
    ...     return gradients, seen.gradients.overflow_rate
    >>> gradients, rate = step(model, jnp.ones((2, 4)))
    >>> float(rate)
    0.0
    """
    if isinstance(model, linen.Module):
        raise InputError(
            "a Linen model holds no state that could be brought up to date; expected record_casts(variables['casts'])"
        )
    return record_nnx(_checked(model), axis_name=axis_name)


@overload
def set_formats(model: nnx.Module, formats: Formats) -> None: ...
@overload
def set_formats(model: Variables, formats: Formats) -> dict[str, Any]: ...
def set_formats(model: nnx.Module | Variables, formats: Formats) -> dict[str, Any] | None:
    """Write other formats into layers. They are data: a jitted step that takes the model compiles nothing again.

    Args:
        model: from :func:`quantize_model`; of NNX the model, which is changed in place; of Linen its variables.
        formats: by pattern of the layer's path (which names no operand), one for all its operands or an
            :class:`~altgrad_core.rules.Each`. Layers that no pattern matches keep theirs.

    Returns:
        Of Linen the variables with the formats in them.

    Raises:
        InputError: for a pattern that matches no layer that is cast, and for float32, which casts nothing.
        ValueError: for a format that needs another cast path than the layer's, which would have to compile.

    >>> model = quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [Rule(".*", "E4M3")])
    >>> set_formats(model, {".*": "E5M2"})
    >>> summary(model).rows[0].formats
    ('E5M2', 'E5M2', 'E5M2')
    """
    if isinstance(model, Mapping):
        return set_linen_formats(model, formats)
    if isinstance(model, linen.Module):
        raise InputError("a Linen model holds no formats; expected its variables")
    return set_nnx_formats(_checked(model), formats)


def summary(model: nnx.Module | linen.Module, *inputs: Any, **options: Any) -> Summary:
    """Every layer that can be cast, with its formats as they stand: prints as a table.

    Args:
        model: plain or quantized.
        *inputs: of Linen the variables, and what the model is called with to find its layers; nothing is computed.
        **options: of Linen ``rngs``, ``method`` and keywords of that call.

    Raises:
        InputError: for inputs of an NNX model, and a Linen model without variables.
    """
    if isinstance(model, linen.Module):
        if not inputs:
            raise InputError(
                "a Linen model does not hold its layers; expected its variables and an example of an input"
            )
        return summarize_linen(model, *inputs, **options)
    if inputs or options:
        raise InputError("an NNX model holds its layers; expected no inputs")
    return summarize_nnx(_checked(model))


def _checked(model: object) -> nnx.Module:
    if not isinstance(model, nnx.Module):
        raise InputError(f"the model is a {type(model).__name__}; expected an nnx.Module or a linen.Module")
    return model
