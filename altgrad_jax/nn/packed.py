"""Models in packed storage: the weights that layers cast, as codes and scales.

``altgrad_torch/nn/packed.py`` says the same thing in torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, overload

import jax
from flax import linen, nnx

from altgrad_core.errors import InputError
from altgrad_jax.nn.linen_models import Variables
from altgrad_jax.nn.linen_packed import pack_linen, unpack_linen
from altgrad_jax.nn.nnx_packed import pack_nnx, unpack_nnx
from altgrad_jax.nn.stored import Tensors
from altgrad_jax.packing import PackedTensor

Model = TypeVar("Model", bound=nnx.Module)


def pack(model: nnx.Module | linen.Module, *inputs: Any, **options: Any) -> dict[str, PackedTensor | jax.Array]:
    """A model by path, its parameters that layers cast as the codes and scales that they compute with.

    They are for :func:`altgrad_jax.packed_files.save_packed`, which ``altgrad_torch`` reads as well. Parameters,
    running statistics (``nnx.BatchStat``, the collection ``"batch_stats"``) and the state of the casts are all that is
    needed to compute the same again; what else a model keeps is left out.

    Args:
        model: from :func:`altgrad_jax.nn.quantize_model`; not traced.
        *inputs: of Linen the variables, and what the model is called with so that all layers compute; only shapes are.
        **options: of Linen ``rngs``, ``method`` and keywords of that call.

    Returns:
        By paths such as ``blocks/0/up/kernel``: packed, or, of what no layer casts, as it is. A parameter that several
        layers share stands under its first path, packed if all of them cast it to the same values; behind a mask it is
        as it is. Of Linen a parameter is packed only in layers of Flax's own classes and outside of
        ``nn.map_variables``, as of ``nn.WeightNorm``. Of each cast ``blocks/0/up/casts/weights/grid``: its
        :class:`~altgrad_jax.params.FormatParams`, as their bits in int32, its ``options`` (where its scales come
        from, as text in uint8), its ``step`` and, where it has one, its ``history`` or static ``scale``.

    Raises:
        InputError: if layers that are stacked in one parameter have different formats, for weights with NaN or
            infinities that their format has no code for, and for inputs of an NNX model; of Linen without variables,
            and if the call does not reach a layer.

    >>> from altgrad_jax.nn import Rule, quantize_model
    >>> rules = [Rule(".*", "E4M3", activations=None)]
    >>> packed = pack(quantize_model(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), rules))
    >>> str(packed["kernel"].codes.dtype), str(packed["bias"].dtype), sorted(packed)[1:4]
    ('uint8', 'float32', ['casts/weights/grid', 'casts/weights/history', 'casts/weights/options'])
    >>> x, model = jax.numpy.ones((1, 8)), quantize_model(linen.Dense(4), rules)
    >>> sorted(pack(model, model.init(jax.random.key(0), x), x)) == sorted(packed)
    True
    """
    if isinstance(model, linen.Module):
        if not inputs:
            raise InputError("a Linen model does not hold its parameters; expected its variables and an input")
        return pack_linen(model, *inputs, **options)
    if inputs or options:
        raise InputError("an NNX model holds its parameters; expected no inputs")
    return pack_nnx(_checked(model))


@overload
def unpack(model: Model, tensors: Tensors) -> Model: ...
@overload
def unpack(model: Variables, tensors: Tensors) -> dict[str, Any]: ...
def unpack(model: nnx.Module | Variables, tensors: Tensors) -> nnx.Module | dict[str, Any]:
    """A model with what was packed: it computes what the packed one did, every bit.

    But where weights have scales that are no powers of two and are not rounded to nearest: there what is on the grid
    may be rounded once more.

    Without the state of casts, as after packing a plain model or in another framework, the casts stay as they are, and
    the histories of weights begin anew with the weights loaded. Weights are then cast to the same values by the same
    rules under static, current or power-of-two scales; delayed scales of activations have to be calibrated.

    Args:
        model: quantized by the same rules and seed; or plain, which takes the values of the weights and no state of
            casts. Of NNX the model, of Linen its variables, which stay as they are.
        tensors: from :func:`pack` or a file.

    Returns:
        A copy of the model, its parameters those of ``tensors``, unpacked; of Linen the variables with them.

    Raises:
        InputError: for names that are missing or that the model does not have, another shape or dtype, and formats and
            ways to scale, round or overflow that are not those of the model's layers.
    """
    if isinstance(model, Mapping):
        return unpack_linen(model, tensors)
    if isinstance(model, linen.Module):
        raise InputError("a Linen model holds no parameters; expected its variables")
    return unpack_nnx(_checked(model), tensors)


def _checked(model: object) -> nnx.Module:
    if not isinstance(model, nnx.Module):
        raise InputError(f"the model is a {type(model).__name__}; expected an nnx.Module or a linen.Module")
    return model
