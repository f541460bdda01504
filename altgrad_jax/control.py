"""The host-side controller in a JAX loop: reads metrics a step late, decides, and writes formats into the state.

What it decides, and why, is :mod:`altgrad_core.control`'s. The device is never waited for: the metrics of step k are
read while step k+1 runs, so a decision lands one step late. Formats are data, so what is written are a few scalars, and
nothing is compiled again.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeAlias, TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from altgrad_core.control import Controller, ControllerOptions
from altgrad_core.control import Decision as Decision
from altgrad_core.errors import InputError
from altgrad_core.events import Event
from altgrad_core.evidence import Observation as Observation
from altgrad_core.evidence import read_by_observations
from altgrad_core.formats import Format, parse
from altgrad_core.settings import Policy as Policy
from altgrad_core.stability import EmergencyMantissaShift as EmergencyMantissaShift
from altgrad_jax.codes import CodeParams
from altgrad_jax.consensus import Consensus, process_count
from altgrad_jax.params import FormatHolder, FormatParams, float_bits, paths_of

State = TypeVar("State")
"""Any pytree of arrays."""

Formats: TypeAlias = "str | Format | Sequence[Formats]"
"""A format, or many, in sequences of sequences."""

Path = tuple[Any, ...]
"""The keys on the way to a leaf, as ``jax.tree.leaves_with_path`` gives them."""


def set_format(state: State, format: Formats | Mapping[str, str | Format]) -> State:
    """Write another format into every :class:`~altgrad_jax.params.FormatParams` of a state, or into those of layers.

    Rounding, overflow policy, path, dtype and sharding are kept, so a jitted step that takes the state is not traced
    again. Nothing is read from the device.

    Args:
        state: any pytree: an optax state, a train state.
        format: the format; for params with a leading axis of runs, one format for all or a sequence with one each, and
            for further axes, as of layers, sequences of sequences. Or a mapping from layers to formats: params belong
            to a layer whose name is a key on the way to them, or several, as in ``blocks/0/mlp``; of several such
            layers to the first. What belongs to none is left as it is.

    Returns:
        The state with the new format in it.

    Raises:
        UnknownFormatError: for an unknown name.
        ValueError: if the state holds no format, or the new one needs another cast path, which would have to compile.
        InputError: for a layer to which nothing belongs, and for a state that holds
            :class:`~altgrad_jax.codes.CodeParams`, whose special codes would stay those of the old format.

    >>> from altgrad_jax.clipping import partition_relative_clip
    >>> state = partition_relative_clip("E7M0").init({"w": jnp.zeros(2)})
    >>> float(set_format(state, "E5M2").format.max_value)
    57344.0
    >>> formats = {"mlp": FormatParams.from_format("E4M3"), "logits": FormatParams.from_format("E4M3")}
    >>> [float(each.max_value) for each in set_format(formats, {"logits": "E5M2"}).values()]
    [57344.0, 448.0]
    """
    if any(_is_code_params(node) for node in jax.tree.leaves(state, is_leaf=_is_code_params)):
        raise InputError("the state holds CodeParams; write those of CodeParams.from_format in their place instead")
    places = [path for path, node in jax.tree.leaves_with_path(state, is_leaf=_is_format) if _is_format(node)]
    if not places:
        raise ValueError("the state holds no FormatParams, so there is no format to set in it")
    if isinstance(format, Mapping):
        chosen = _of_layers({path: jax.tree_util.keystr(path, simple=True, separator="/") for path in places}, format)
    else:
        chosen = dict.fromkeys(places, _parsed(format))

    def rewritten(path: Path, node: FormatParams | FormatHolder) -> FormatParams | FormatHolder:
        if path not in chosen:
            return node
        if isinstance(node, FormatHolder):
            return node.with_params(_rewritten(node.params, chosen[path]))
        return _rewritten(node, chosen[path])

    return jax.tree.map_with_path(rewritten, state, is_leaf=_is_format)


def get_format(state: object) -> FormatParams:
    """The first :class:`~altgrad_jax.params.FormatParams` in a state: what :func:`set_format` keeps up to date.

    For a step that casts in the format that its optax state carries.

    Raises:
        ValueError: if the state holds no format.

    >>> from altgrad_jax.clipping import partition_relative_clip
    >>> float(get_format(partition_relative_clip("E3M4").init({"w": jnp.zeros(2)})).max_value)
    124.0
    """
    nodes = jax.tree.leaves(state, is_leaf=_is_format)
    found = next((node for node in nodes if _is_format(node)), None)
    if found is None:
        raise ValueError("the state holds no FormatParams")
    return found.params if isinstance(found, FormatHolder) else found


def _is_code_params(node: object) -> bool:
    return isinstance(node, CodeParams)


def _is_format(node: object) -> bool:
    return isinstance(node, FormatParams | FormatHolder)


def _parsed(format: Formats) -> npt.NDArray[np.object_]:
    """Formats as an array of objects, of the shape of the sequences that they come in."""

    def nested(formats: Formats) -> Any:
        many = isinstance(formats, Iterable) and not isinstance(formats, (str, Format))
        return [nested(each) for each in formats] if many else parse(formats)

    return np.array(nested(format), object)


def _of_layers(places: Mapping[Path, str], formats: Mapping[str, str | Format]) -> dict[Path, npt.NDArray[np.object_]]:
    """The format of each place that belongs to a layer."""
    within = {path: f"/{name}/" for path, name in places.items()}
    layer_of = {path: next((layer for layer in formats if f"/{layer}/" in name), None) for path, name in within.items()}
    for layer in formats:
        if layer not in layer_of.values():
            known = sorted({part for name in places.values() for part in name.split("/")})
            near = difflib.get_close_matches(layer, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"no format belongs to the layer {layer!r}; {hint}They are at {', '.join(places.values())}"
            )
    return {path: _parsed(formats[layer]) for path, layer in layer_of.items() if layer is not None}


def _rewritten(params: FormatParams, formats: npt.NDArray[np.object_]) -> FormatParams:
    listed: list[Format] = formats.ravel().tolist()
    for each in set(listed):
        if params.path not in paths_of(each):
            raise ValueError(
                f"{each} is cast on the {each.cast_path} path; this state was compiled for the {params.path} path. "
                "Start a new run in that format"
            )
    shape, given = params.mantissa_bits.shape, () if len(listed) == 1 else formats.shape
    if given != shape[: len(given)]:
        told = " x ".join(map(str, given))
        raise ValueError(f"{told} formats for params of shape {shape}; expected one, or one for each run")

    def column(old: jax.Array, value: Callable[[Format], float]) -> jax.Array:
        values = np.array([value(each) for each in listed], old.dtype).reshape(given + (1,) * (len(shape) - len(given)))
        return replace_data(old, np.broadcast_to(values, shape))

    return replace(
        params,
        mantissa_bits=column(params.mantissa_bits, lambda each: each.mantissa_bits),
        min_exponent=column(params.min_exponent, lambda each: each.min_exponent),
        max_value=column(params.max_value, lambda each: each.max_representable_value),
        native_overflow=column(params.native_overflow, lambda each: float_bits(each.overflow_value)),
        negative_zero=column(params.negative_zero, lambda each: each.has_negative_zero),
    )


def replace_data(old: jax.Array, new: np.ndarray) -> jax.Array:
    """New values in an array's place: its dtype, its sharding, and committed to devices only if it was."""
    values = new.astype(old.dtype)
    if isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer) and old.committed:
        # Not device_put: on several processes that first compares their values, on the devices.
        return jax.make_array_from_callback(values.shape, old.sharding, lambda index: values[index])
    return jnp.asarray(values)


def _on_host(metric: jax.Array | float | str) -> float | str:
    return float(metric.item()) if isinstance(metric, jax.Array) else metric


class FormatController(Controller):
    """Keeps one run alive: shifts its format, changes its rounding, or sends it back to a snapshot.

    It is made as :class:`altgrad_core.control.Controller` is. In a loop of your own :meth:`step` reads late, decides
    and writes formats, while :meth:`observe` only decides. Given a mapping from layers to formats it moves each alone:
    metrics then hold the rates of each, as ``mlp/overflow_rate``, and the state has the format of each under its name,
    as :func:`set_format` looks for it.

    After ``jax.distributed.initialize()`` process 0 decides for all, on what it sees itself; the others take over what
    it decided and what it remembers. Each process observes every step, and each carries a decision out between the
    same two steps, whatever it saw. Hosts wait for the host of process 0, none for a device.

    Args:
        format: the format that the run starts in, or a mapping from its layers to formats.
        together: whether all processes of ``jax.distributed`` train this run; False for one that this process has to
            itself.
        options: what :class:`altgrad_core.control.Controller` takes beside the format.

    Raises:
        ValueError: as of that class.

    >>> controller = FormatController("E7M0", policy="off", shifter=EmergencyMantissaShift(nan_patience=2))
    >>> [controller.observe(Observation(step, float("nan"), finite=False)).format for step in range(2)]
    [None, 'E5M2']
    """

    def __init__(
        self, format: str | Mapping[str, str], *, together: bool = True, **options: Unpack[ControllerOptions]
    ) -> None:
        super().__init__(format, **options)
        self._consensus = Consensus() if together else None

    def observe(self, seen: Observation, *, in_flight: int | None = None) -> Decision:
        """Take one step's observation and decide, on several processes as the first one does.

        Args:
            seen: the numbers of a step; those of process 0 count.
            in_flight: the last step that was already started when the decision lands; see
                :meth:`altgrad_core.control.Controller.observe`.

        Returns:
            What to do; a decision that does not act is the usual one.

        Raises:
            InputError: if a policy of one's own calls for what the run cannot do.
            RuntimeError: on the other processes, where process 0 failed or observed another step.
            TimeoutError: if process 0 observes nothing for half an hour.
        """
        if self._consensus is None or process_count() == 1:
            return super().observe(seen, in_flight=in_flight)
        if jax.process_index() != 0:
            return self._take_over(json.loads(self._consensus.from_first("")), seen.step)
        decision, failure = Decision(), None
        told: dict[str, Any] = {"step": seen.step, "failed": None}
        try:
            decision = super().observe(seen, in_flight=in_flight)
            text = json.dumps(told | {"decision": asdict(decision), "memory": self._remembered()})
        except Exception as error:  # told to the others, who would wait for it
            failure, text = error, json.dumps(told | {"failed": repr(error)})
        self._consensus.from_first(text)
        if failure is not None:
            raise failure
        return decision

    def step(
        self,
        step: int,
        metrics: Mapping[str, jax.typing.ArrayLike | str],
        state: State,
        roll_back: Callable[[State], State] | None = None,
    ) -> State:
        """Hand over the metrics of a step that was just dispatched; decide on those of the step before.

        Args:
            step: its number.
            metrics: ``loss`` and ``finite``; if there are, ``params_finite``, the gradients' ``norm`` and rates under
                the names of :class:`~altgrad_core.evidence.Observation`, of layers as ``mlp/overflow_rate``: arrays of
                one element, or numbers. Other names are passed over.
            state: the state after the step, not read.
            roll_back: takes a state back to a snapshot, as :meth:`altgrad_jax.SnapshotKeeper.roll_back` does; goes with
                ``can_roll_back``.

        Returns:
            The state to go on from, with another format in it if that was decided.

        Raises:
            InputError: if the controller may decide what this cannot carry out, and for a metric that is no single
                number.
        """
        self._check_step_can_carry_out(roll_back)
        read = read_by_observations(metrics)
        for value in read.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        decision = self.observe_late(step, lambda: {name: _on_host(value) for name, value in read.items()})
        return self._carried_out(decision, state, roll_back)

    def drain(self, state: State, roll_back: Callable[[State], State] | None = None) -> State:
        """Decide on the last step, whose metrics no further :meth:`step` would read."""
        self._check_step_can_carry_out(roll_back)
        return self._carried_out(self.observe_last(), state, roll_back)

    def _take_over(self, told: Mapping[str, Any], step: int) -> Decision:
        """Decide and remember what process 0 has."""
        if told["failed"] is not None:
            raise RuntimeError(f"process 0 could not decide on step {told['step']}: {told['failed']}")
        if told["step"] != step:
            raise RuntimeError(
                f"process {jax.process_index()} observes step {step} but process 0 step {told['step']}; expected the "
                "same steps on all"
            )
        what = told["decision"]
        events = tuple(Event(**each) for each in what["events"])
        self._take_up(told["memory"])
        self.events.extend(events)
        return Decision(**(what | {"events": events}))

    def _carried_out(self, decision: Decision, state: State, roll_back: Callable[[State], State] | None) -> State:
        if decision.rollback and roll_back is not None:
            state = roll_back(state)
        # A snapshot may be older than a shift. Before the first there is none to write: groups of a clipper may have
        # formats of their own.
        if not (decision.acts and self.has_shifted):
            return state
        state = set_format(state, self.format)
        return set_format(state, self.formats) if self.formats else state
