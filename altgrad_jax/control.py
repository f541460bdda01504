"""The host-side controller in a JAX loop: reads metrics a step late, decides, and writes formats into the state.

What it decides, and why, is :mod:`altgrad_core.control`'s. The device is never waited for: the metrics of step k are
read while step k+1 runs, so a decision lands one step late. Formats are data, so what is written are a few scalars, and
nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_core.control import Controller
from altgrad_core.control import Decision as Decision
from altgrad_core.evidence import Observation as Observation
from altgrad_core.formats import Format, parse
from altgrad_core.settings import Policy as Policy
from altgrad_core.stability import EmergencyMantissaShift as EmergencyMantissaShift
from altgrad_jax.params import FormatParams, paths_of

State = TypeVar("State")
"""Any pytree of arrays."""


def set_format(state: State, format: str | Format | Sequence[str | Format]) -> State:
    """Write another format into every :class:`~altgrad_jax.params.FormatParams` of a state.

    Rounding, overflow policy, path, dtype and sharding are kept, so a jitted step that takes the state is not traced
    again. Nothing is read from the device.

    Args:
        state: any pytree: an optax state, a train state.
        format: the format; for params with a leading axis of runs, one format for all or a sequence with one each.

    Returns:
        The state with the new format in it.

    Raises:
        UnknownFormatError: for an unknown name.
        ValueError: if the state holds no format, or the new one needs another cast path, which would have to compile.

    >>> from altgrad_jax.clipping import partition_relative_clip
    >>> state = partition_relative_clip("E7M0").init({"w": jnp.zeros(2)})
    >>> float(set_format(state, "E5M2").format.max_value)
    57344.0
    """
    formats = [parse(format)] if isinstance(format, (str, Format)) else [parse(each) for each in format]
    found = False

    def rewritten(node: Any) -> Any:
        nonlocal found
        if not isinstance(node, FormatParams):
            return node
        found = True
        return _rewritten(node, formats)

    result = jax.tree.map(rewritten, state, is_leaf=lambda node: isinstance(node, FormatParams))
    if not found:
        raise ValueError("the state holds no FormatParams, so there is no format to set in it")
    return result


def get_format(state: object) -> FormatParams:
    """The first :class:`~altgrad_jax.params.FormatParams` in a state: what :func:`set_format` keeps up to date.

    For a step that casts in the format that its optax state carries.

    Raises:
        ValueError: if the state holds no format.

    >>> from altgrad_jax.clipping import partition_relative_clip
    >>> float(get_format(partition_relative_clip("E3M4").init({"w": jnp.zeros(2)})).max_value)
    124.0
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, FormatParams))
    found = [node for node in nodes if isinstance(node, FormatParams)]
    if not found:
        raise ValueError("the state holds no FormatParams")
    return found[0]


def _rewritten(params: FormatParams, formats: Sequence[Format]) -> FormatParams:
    for each in formats:
        if params.path not in paths_of(each):
            raise ValueError(
                f"{each} is cast on the {each.cast_path} path; this state was compiled for the {params.path} path. "
                "Start a new run in that format"
            )
    shape = params.mantissa_bits.shape
    if len(formats) != 1 and shape != (len(formats),):
        raise ValueError(f"{len(formats)} formats for params of shape {shape}; expected one, or one for each run")

    def column(old: jax.Array, values: list[float]) -> jax.Array:
        return replace_data(old, np.broadcast_to(np.array(values if shape else values[0], old.dtype), shape))

    return replace(
        params,
        mantissa_bits=column(params.mantissa_bits, [each.mantissa_bits for each in formats]),
        min_exponent=column(params.min_exponent, [each.min_exponent for each in formats]),
        max_value=column(params.max_value, [each.max_representable_value for each in formats]),
        native_overflow=column(params.native_overflow, [each.overflow_value for each in formats]),
        negative_zero=column(params.negative_zero, [each.has_negative_zero for each in formats]),
    )


def replace_data(old: jax.Array, new: np.ndarray) -> jax.Array:
    """New values in an array's place: its dtype, its sharding, and committed to devices only if it was."""
    if isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer) and old.committed:
        return jax.device_put(new.astype(old.dtype), old.sharding)
    return jnp.asarray(new.astype(old.dtype))


class FormatController(Controller):
    """Keeps one run alive: shifts its format, changes its rounding, or sends it back to a snapshot.

    It is made as :class:`altgrad_core.control.Controller` is. In a loop of your own :meth:`step` reads late, decides
    and writes formats, while :meth:`observe` only decides.

    >>> controller = FormatController("E7M0", policy="off", shifter=EmergencyMantissaShift(nan_patience=2))
    >>> [controller.observe(Observation(step, float("nan"), finite=False)).format for step in range(2)]
    [None, 'E5M2']
    """

    def step(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        state: State,
        roll_back: Callable[[State], State] | None = None,
    ) -> State:
        """Hand over the metrics of a step that was just dispatched; decide on those of the step before.

        Args:
            step: its number.
            metrics: device scalars ``loss`` and ``finite``; if there are, ``params_finite`` and rates under the names
                of :class:`~altgrad_core.evidence.Observation`.
            state: the state after the step, not read.
            roll_back: takes a state back to a snapshot, as :meth:`altgrad_jax.SnapshotKeeper.roll_back` does; goes with
                ``can_roll_back``.

        Returns:
            The state to go on from, with another format in it if that was decided.

        Raises:
            InputError: if the controller may decide what this cannot carry out.
        """
        self._check_step_can_carry_out(roll_back)
        for value in metrics.values():
            value.copy_to_host_async()
        decision = self.observe_late(step, lambda: {name: float(value) for name, value in metrics.items()})
        return self._carried_out(decision, state, roll_back)

    def drain(self, state: State, roll_back: Callable[[State], State] | None = None) -> State:
        """Decide on the last step, whose metrics no further :meth:`step` would read."""
        self._check_step_can_carry_out(roll_back)
        return self._carried_out(self.observe_last(), state, roll_back)

    def _carried_out(self, decision: Decision, state: State, roll_back: Callable[[State], State] | None) -> State:
        if decision.rollback and roll_back is not None:
            state = roll_back(state)
        return set_format(state, self.format) if decision.acts else state
