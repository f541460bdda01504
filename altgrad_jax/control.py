"""The host-side controller: reads metrics a step late, decides, and writes formats into the state.

The device is never waited for: the metrics of step k are read while step k+1 runs, so a decision lands one step late.
Formats are data, so what is written are a few scalars, and nothing is compiled again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_core.errors import InputError
from altgrad_core.events import Event
from altgrad_core.formats import Format, Rounding, parse
from altgrad_core.stability import EmergencyMantissaShift
from altgrad_jax.params import FormatParams, paths_of

State = TypeVar("State")
"""Any pytree of arrays."""

StallRule = Literal["relative", "literal", "off"]


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


@dataclass(frozen=True)
class Policy:
    """When the controller acts. Rates are means over a window that starts anew after every decision.

    Attributes:
        stall_rule: ``literal``: a windowed stall rate above the shifter's threshold shifts the format. ``relative``:
            the weights must also be stored on the grid (a float32 master moves all the same), the share of updates that
            move must have fallen below ``moving_share`` of what it was in this format's first window, and the loss must
            be on a plateau; the first remedy is stochastic rounding, the next a shift. ``off``: stalls do nothing.
        window: observations in a window.
        warmup: steps before the first stall decision.
        cooldown: steps after a decision in which stalls do nothing.
        moving_share: see ``relative``.
        plateau: improvement of the mean loss from one window to the next, in nats, below which it is on a plateau.
        runaway_margin: nats above the running mean at which a loss counts as running away.
        runaway_patience: losses in a row that far up before the run goes back to a snapshot.
        rollback_patience: non-finite steps in a row before it does; at once if parameters are not finite.
    """

    stall_rule: StallRule = "relative"
    window: int = 20
    warmup: int = 20
    cooldown: int = 50
    moving_share: float = 0.75
    plateau: float = 0.01
    runaway_margin: float = 0.3
    runaway_patience: int = 3
    rollback_patience: int = 6


@dataclass(frozen=True)
class Observation:
    """What the host sees of a step.

    Attributes:
        step: which one.
        loss: training loss.
        finite: whether loss and gradients were.
        params_finite: whether the parameters were, after it.
        stall_rate: of its update.
    """

    step: int
    loss: float
    finite: bool
    params_finite: bool = True
    stall_rate: float = 0.0


@dataclass(frozen=True)
class Decision:
    """What to do to a run.

    Attributes:
        format: the format to shift to, or None.
        rounding: the rounding of committed weights to change to, or None.
        rollback: whether to go back to the older snapshot.
        events: the same as lines for the log, with what called for it.
    """

    format: str | None = None
    rounding: Rounding | None = None
    rollback: bool = False
    events: tuple[Event, ...] = ()

    @property
    def acts(self) -> bool:
        """Whether the state has to change."""
        return self.format is not None or self.rounding is not None or self.rollback


@dataclass
class _Memory:
    """What the controller remembers between observations: plain numbers, so that it can be saved."""

    nans: int = 0
    runaway: int = 0
    mean_loss: float | None = None
    cooldown_until: int = -1
    ignore_through: int = -1
    baseline_stall: float | None = None
    previous_loss: float | None = None
    stalls: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class FormatController:
    """Keeps one run alive: shifts its format, changes its rounding, or sends it back to a snapshot.

    The rule of the shift is :class:`~altgrad_core.stability.EmergencyMantissaShift`; the policy decides what that rule
    gets to see. In a loop of your own :meth:`step` reads late, decides and writes formats, while :meth:`observe` only
    decides.

    Args:
        format: the format that the run starts in.
        policy: when to act.
        shifter: the rule of the shift, with its patience and threshold; None for a run whose format must stay.
        rounding: how committed weights are rounded, or None for float32 masters.
        can_roll_back: whether snapshots are kept.

    Raises:
        ValueError: if a shift is asked for in a format that has no entry in the fallback table, such as float32.

    >>> controller = FormatController("E7M0", shifter=EmergencyMantissaShift(nan_patience=2))
    >>> [controller.observe(Observation(step, float("nan"), finite=False)).format for step in range(2)]
    [None, 'E5M2']
    """

    def __init__(
        self,
        format: str,
        *,
        policy: Policy | None = None,
        shifter: EmergencyMantissaShift | None = None,
        rounding: Rounding | None = None,
        can_roll_back: bool = False,
    ) -> None:
        self.format = str(parse(format))
        self.rounding = rounding
        self.policy = policy or Policy()
        self.shifter = shifter
        self.can_roll_back = can_roll_back
        self.events: list[Event] = []
        self._memory = _Memory()
        self._pending: deque[tuple[int, Mapping[str, Any]]] = deque()
        if shifter is not None and not shifter.knows(self.format):
            raise InputError(
                f"a {self.format} run cannot shift: it is not in the fallback table; expected one of "
                f"{', '.join(shifter.FORMAT_FALLBACK)}"
            )

    def observe(self, seen: Observation, *, in_flight: int | None = None) -> Decision:
        """Take one step's observation and decide.

        Args:
            seen: the numbers of a step.
            in_flight: the last step that was already started when the decision lands; what it shows is not judged,
                since it ran before the decision.

        Returns:
            What to do; a decision that does not act is the usual one.
        """
        memory = self._memory
        if seen.step <= memory.ignore_through:
            return Decision()
        memory.nans = 0 if seen.finite else memory.nans + 1
        events = [*self._judge_health(seen), *self._judge_format(seen)]
        decision = Decision(
            format=next((str(event.numbers["to"]) for event in events if event.kind == "shift"), None),
            rounding="stochastic" if any(event.kind == "rounding" for event in events) else None,
            rollback=any(event.kind == "rollback" for event in events),
            events=tuple(events),
        )
        if events:
            self._start_anew(seen.step, in_flight if decision.acts else seen.step, decision)
        self.events.extend(events)
        return decision

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
            metrics: device scalars ``loss`` and ``finite``; ``stall_rate`` and ``params_finite`` if there are.
            state: the state after the step, not read.
            roll_back: takes a state back to a snapshot; goes with ``can_roll_back``.

        Returns:
            The state to go on from, with another format in it if that was decided.

        Raises:
            InputError: if the controller may decide what this cannot carry out.
        """
        self._check_can_carry_out(roll_back)
        for value in metrics.values():
            value.copy_to_host_async()
        self._pending.append((step, metrics))
        return state if len(self._pending) < 2 else self._settle(state, roll_back, in_flight=step)

    def drain(self, state: State, roll_back: Callable[[State], State] | None = None) -> State:
        """Decide on the last step, whose metrics no further :meth:`step` would read."""
        self._check_can_carry_out(roll_back)
        return self._settle(state, roll_back, in_flight=None) if self._pending else state

    def _check_can_carry_out(self, roll_back: Callable[[State], State] | None) -> None:
        if self.rounding is not None:
            raise InputError("step() cannot change how weights are rounded: use observe() and write what it decides")
        if (roll_back is not None) != self.can_roll_back:
            raise InputError(
                f"can_roll_back is {self.can_roll_back} but roll_back is {roll_back!r}; give both or neither"
            )

    def _settle(self, state: State, roll_back: Callable[[State], State] | None, in_flight: int | None) -> State:
        earlier, values = self._pending.popleft()
        read = {name: float(value) for name, value in values.items()}
        seen = Observation(
            earlier,
            read["loss"],
            finite=bool(read["finite"]),
            params_finite=bool(read.get("params_finite", 1.0)),
            stall_rate=read.get("stall_rate", 0.0),
        )
        decision = self.observe(seen, in_flight=in_flight)
        if decision.rollback and roll_back is not None:
            state = roll_back(state)
        return set_format(state, self.format) if decision.acts else state

    @property
    def calm(self) -> bool:
        """Whether the last observation gave no reason to doubt the run: the time to take a snapshot."""
        return self._memory.nans == 0 and self._memory.runaway == 0

    def saved(self) -> dict[str, Any]:
        """Everything the controller remembers, as JSON-ready values (metrics still on the device excepted)."""
        return {
            "format": self.format,
            "rounding": self.rounding,
            "consecutive_nans": self.shifter.consecutive_nans if self.shifter else 0,
            "memory": asdict(self._memory),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up what :meth:`saved` returned."""
        self.format = saved["format"]
        self.rounding = saved["rounding"]
        if self.shifter is not None:
            self.shifter.consecutive_nans = saved["consecutive_nans"]
        self._memory = _Memory(**saved["memory"])

    def _judge_health(self, seen: Observation) -> list[Event]:
        """Is the run poisoned? Then only a snapshot helps."""
        memory, policy = self._memory, self.policy
        running_away = (
            seen.finite and memory.mean_loss is not None and seen.loss > memory.mean_loss + policy.runaway_margin
        )
        memory.runaway = memory.runaway + 1 if running_away else 0
        if seen.finite and not running_away:
            memory.mean_loss = seen.loss if memory.mean_loss is None else 0.9 * memory.mean_loss + 0.1 * seen.loss
        if not self.can_roll_back:
            return []
        if not seen.params_finite:
            return [Event(seen.step, "rollback", "poisoned weights", {"loss": seen.loss})]
        if memory.nans >= policy.rollback_patience:
            return [Event(seen.step, "rollback", "nan", {"consecutive_nans": memory.nans})]
        if memory.runaway >= policy.runaway_patience:
            return [Event(seen.step, "rollback", "runaway loss", {"loss": seen.loss, "mean": memory.mean_loss or 0.0})]
        return []

    def _judge_format(self, seen: Observation) -> list[Event]:
        """Can the format carry the run? The shifter rules, on what the policy lets it see."""
        stall_rate = self._stall_to_judge(seen)
        if stall_rate > 0 and self._has_stochastic_remedy(stall_rate):
            return [Event(seen.step, "rounding", "stall", {"stall_rate": stall_rate, "to": "stochastic"})]
        if self.shifter is None:
            return []
        nans = self.shifter.consecutive_nans + 1
        target = self.shifter.check_and_shift(self.format, not seen.finite, stall_rate)
        by_nan = not seen.finite and nans >= self.shifter.nan_patience
        by_stall = stall_rate > self.shifter.stall_threshold
        if not (by_nan or by_stall):
            return []
        numbers = {"consecutive_nans": nans} if by_nan else {"stall_rate": stall_rate}
        if target is None:
            return [Event(seen.step, "exhausted", "nan" if by_nan else "stall", {**numbers, "from": self.format})]
        return [Event(seen.step, "shift", "nan" if by_nan else "stall", {**numbers, "from": self.format, "to": target})]

    def _has_stochastic_remedy(self, stall_rate: float) -> bool:
        threshold = self.shifter.stall_threshold if self.shifter else EmergencyMantissaShift().stall_threshold
        return self.policy.stall_rule == "relative" and self.rounding == "nearest_even" and stall_rate > threshold

    def _stall_to_judge(self, seen: Observation) -> float:
        """The windowed stall rate, or 0 where the policy sees no reason to judge it."""
        memory, policy = self._memory, self.policy
        if policy.stall_rule == "off" or not seen.finite or (policy.stall_rule == "relative" and self.rounding is None):
            return 0.0
        memory.stalls.append(seen.stall_rate)
        memory.losses.append(seen.loss)
        if len(memory.stalls) < policy.window:
            return 0.0
        stall, loss = float(np.mean(memory.stalls)), float(np.mean(memory.losses))
        eligible = seen.step >= max(policy.warmup, memory.cooldown_until)
        if policy.stall_rule == "literal":
            memory.stalls.pop(0)
            memory.losses.pop(0)
            return stall if eligible else 0.0
        memory.stalls.clear()
        memory.losses.clear()
        if memory.baseline_stall is None or memory.previous_loss is None:
            memory.baseline_stall, memory.previous_loss = stall, loss
            return 0.0
        on_plateau = loss > memory.previous_loss - policy.plateau
        memory.previous_loss = loss
        has_risen = 1 - stall < policy.moving_share * (1 - memory.baseline_stall)
        return stall if eligible and on_plateau and has_risen else 0.0

    def _start_anew(self, step: int, in_flight: int | None, decision: Decision) -> None:
        self.format = decision.format or self.format
        self.rounding = decision.rounding or self.rounding
        memory = self._memory
        self._memory = _Memory(
            nans=0 if decision.rollback else memory.nans,
            runaway=0 if decision.rollback else memory.runaway,
            # The loss of the snapshot may lie well above the mean since then: that would send the run back for ever.
            mean_loss=None if decision.rollback else memory.mean_loss,
            cooldown_until=step + self.policy.cooldown,
            ignore_through=step if in_flight is None else in_flight,
        )
