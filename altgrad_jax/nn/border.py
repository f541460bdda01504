"""Borders that XLA's CPU backend does not fuse across."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.interpreters.mlir import ir

Result = TypeVar("Result")


Tree = Any
"""A pytree of arrays."""


def as_one_value(function: Callable[..., Result], *args: Tree, **static: Hashable) -> Result:
    """Call a function so that XLA's CPU backend computes its argument and its result once each.

    Left alone it fuses a cast into every consumer and what makes its argument into every cast, and so computes both up
    to three times, behind transposes; optimization barriers are gone before it fuses. A call that must not be inlined
    is a border that it respects. Other backends get the function as it is.

    Args:
        function: of pytrees of arrays, static ones by keyword, to a pytree with an array in it; the same object each
            time, since what JAX traces of it is kept by it.
        *args: pytrees of arrays.
        **static: what is no array.
    """
    # On the way back JAX sets the mesh that is there anyway, and would trace all of it again for that.
    with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
        return _with_border(function, tuple(sorted(static)))(*args, **static)


@functools.cache
def _with_border(function: Callable[..., Result], names: tuple[str, ...]) -> Callable[..., Result]:
    called = jax.jit(function, static_argnames=names)

    def with_border(*args: Tree, **static: Hashable) -> Result:
        leaves, structure = jax.tree.flatten(called(*args, **static))
        return structure.unflatten([_border_p.bind(leaves[0]), *leaves[1:]])

    return jax.jit(with_border, static_argnames=names, inline=True)


_border_p = Primitive("border")
"""The identity, which marks the call that its argument is a result of. By ``lax.platform_dependent`` and
``set_xla_metadata`` a decoder's step with fifty casts took a sixth longer to trace and compile: for each call they make
two conditionals, in which XLA copies all that is called."""
_border_p.def_impl(lambda x: x)
_border_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_border_p, lambda tangent, _: [tangent])


def _batched(args: Sequence[jax.Array], axes: Sequence[int]) -> tuple[jax.Array, int]:
    return _border_p.bind(args[0]), axes[0]


batching.primitive_batchers[_border_p] = _batched


def _lowered(context: mlir.LoweringRuleContext, x: ir.Value) -> list[ir.Value]:
    # Not in what is exported for several platforms, which share the call; and where x is the argument of a function,
    # its maker is out of sight.
    if tuple(context.module_context.platforms) == ("cpu",) and not isinstance(x.owner, ir.Block):
        attributes, name = x.owner.attributes, "mhlo.frontend_attributes"
        others = {each.name: each.attr for each in ir.DictAttr(attributes[name])} if name in attributes else {}
        attributes[name] = ir.DictAttr.get({**others, "inlineable": ir.StringAttr.get("false")})
    return [x]


mlir.register_lowering(_border_p, _lowered, cacheable=False)  # a cached rule would not see the call
