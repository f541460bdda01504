"""Borders that XLA's CPU backend does not fuse across."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

Result = TypeVar("Result")


Tree = Any
"""A pytree of arrays."""


def as_one_value(function: Callable[..., Result], *args: Tree, **static: Hashable) -> Result:
    """Call a function so that XLA's CPU backend computes its argument and its result once each.

    Left alone it fuses a cast into every consumer and what makes its argument into every cast, and so computes both up
    to three times, behind transposes; optimization barriers are gone before it fuses. A call that must not be inlined
    is a border that it respects. Other backends get the function as it is.

    Args:
        function: of pytrees of arrays, static ones by keyword; the same object each time, since what JAX traces of it
            is kept by it.
        *args: pytrees of arrays.
        **static: what is no array.
    """
    # On the way back JAX sets the mesh that is there anyway, and would trace all of it again for that.
    with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
        return _traced_once(function, tuple(sorted(static)))(*args, **static)


@functools.cache
def _traced_once(function: Callable[..., Result], names: tuple[str, ...]) -> Callable[..., Result]:
    traced = jax.jit(function, static_argnames=names)  # once for both branches, which have metadata of their own

    def inside(*args: Tree, **static: Hashable) -> Result:
        # Without this every jitted helper of jax.numpy in here would become a border as well.
        with set_xla_metadata(inlineable=None):
            return traced(*args, **static)

    called = jax.jit(inside, static_argnames=names)

    def by_platform(*args: Tree, **static: Hashable) -> Result:
        def apart(*args: Tree) -> Result:
            with set_xla_metadata(inlineable="false"):
                return called(*args, **static)

        return lax.platform_dependent(*args, cpu=apart, default=functools.partial(called, **static))

    return jax.jit(by_platform, static_argnames=names, inline=True)
