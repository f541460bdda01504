"""Snapshots for a loop of one's own: when to take one, where they lie, and how to come back to one.

The loop never waits: a snapshot is dispatched like a step, whether it is kept is decided on the device, or on the host
once that is known. ``altgrad_torch/keeper.py`` says the same thing in place.
"""

from __future__ import annotations

from typing import Generic

import jax
import jax.numpy as jnp
import numpy as np

from altgrad_core.errors import InputError
from altgrad_core.settings import check_count
from altgrad_core.snapshots import LastGood, Where, check_where
from altgrad_jax.recovery import Snapshots, State, rollback, snapshot


class SnapshotKeeper(Generic[State]):
    """Keeps the last good states of a run and brings one back: for a loop of one's own.

    Give it what should go back (parameters, optimizer state, amax history), and keep out of it what has to go on: the
    step number, and with it the batches, so that the run does not meet the same batch again. The state may be donated
    to the next step; what :meth:`roll_back` returns does not alias what is kept, and has the shapes, dtypes, weak types
    and shardings of the state given, so that nothing is compiled again.

    Args:
        state: the state to start from, which stands for all snapshots until better ones are taken.
        every: steps between snapshots, at least 1.
        keep: how many to keep, at least 1.
        where: ``device`` for a ring beside the state, exactly ``keep`` copies, or ``host`` for the host's memory
            (pinned, and copied to while the device works on); then one more while it is not known to be good.

    Raises:
        InputError: for values out of range.

    >>> keeper = SnapshotKeeper({"w": jnp.float32(0)}, every=10)
    >>> for step in range(1, 41):
    ...     keeper.offer(step, {"w": jnp.float32(step)}, good=step != 40)
    >>> float(keeper.roll_back({"w": jnp.float32(jnp.nan)})["w"])
    20.0
    """

    def __init__(self, state: State, *, every: int = 50, keep: int = 2, where: Where = "device") -> None:
        self.every = check_count("every", every, 1)
        check_count("keep", keep, 1)
        check_where(where)
        self._structure, self._types = jax.tree.structure(state), _types_of(state)
        self._kept = _OnDevice(state, keep) if where == "device" else _OnHost(state, keep)

    def offer(self, step: int, state: State, good: bool | jax.Array = True) -> None:
        """Take a snapshot if ``step`` is a multiple of ``every``. Call it after each step; it reads nothing.

        Args:
            step: its number.
            state: the state after it.
            good: whether to keep it: its loss was finite, its parameters are (:func:`altgrad_jax.all_finite`), and the
                loss is not running away (:attr:`altgrad_jax.FormatController.calm`). A bool, or a bool scalar that is
                still being computed.

        Raises:
            InputError: for a state of another structure, or with other shapes or dtypes, than that to start from.
        """
        if step % self.every == 0 and good is not False:
            self._check_alike(state)
            self._kept.push(state, good)

    def roll_back(self, state: State, back: int | None = None) -> State:
        """Go back to a snapshot, which then stands for all newer ones as well. Fits ``FormatController.step``.

        Args:
            state: the state now: only its structure, shapes, shardings and types are looked at.
            back: how many snapshots to go back: 1 for the newest; the oldest by default.

        Returns:
            A copy of the state that was kept, moments and all; see :func:`altgrad_jax.reset_moments` for new ones.

        Raises:
            InputError: for ``back`` beyond what is kept, and for a state of another structure, or with other shapes or
                dtypes.
        """
        self._check_alike(state)
        return jax.tree.map(_placed_like, self._kept.pop(state, back), state)

    def _check_alike(self, state: State) -> None:
        """Refuse what would come back as something else: a ring broadcasts and casts, copies take anything."""
        kept, now = self._types, _types_of(state)
        for name in (*kept, *now):
            if now.get(name) != kept.get(name):
                raise InputError(
                    f"the state has {now.get(name, 'nothing')} at {name or 'its root'}; expected "
                    f"{kept.get(name, 'nothing')}, as the snapshots have"
                )
        structure = jax.tree.structure(state)
        if structure != self._structure:
            raise InputError(
                f"the state has the structure {structure}; expected that of the snapshots: {self._structure}"
            )


class _OnDevice(Generic[State]):
    """The ring of :class:`Snapshots`, written in place."""

    def __init__(self, state: State, keep: int) -> None:
        self._snapshots = Snapshots.of(state, keep)
        self._push = jax.jit(snapshot, donate_argnums=0)
        self._pop = jax.jit(rollback, donate_argnums=0, static_argnames="back")

    def push(self, state: State, good: bool | jax.Array) -> None:
        self._snapshots = self._push(self._snapshots, state, jnp.asarray(good))

    def pop(self, state: State, back: int | None) -> State:
        restored, self._snapshots = self._pop(self._snapshots, state, True, back=back)
        return restored


class _OnHost(Generic[State]):
    """Copies in the host's memory."""

    def __init__(self, state: State, keep: int) -> None:
        self._kept = LastGood(_on_host(state), keep)

    def push(self, state: State, good: bool | jax.Array) -> None:
        if isinstance(good, jax.Array):
            good.copy_to_host_async()
        self._kept.push(_on_host(state), lambda: bool(good))

    def pop(self, state: State, back: int | None) -> State:
        return self._kept.go_back(back)


def _types_of(state: object) -> dict[str, str]:
    """Dtype and shape of each leaf, by its place."""
    types = {path: jax.typeof(leaf) for path, leaf in jax.tree.leaves_with_path(state)}
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{each.dtype}{list(each.shape)}"
        for path, each in types.items()
    }


def _on_host(state: State) -> State:
    """A copy in pinned memory, begun now; what is donated afterwards is read before it is overwritten."""

    def copied(leaf: jax.typing.ArrayLike) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))

    return jax.tree.map(copied, state)


def _placed_like(restored: jax.Array, now: jax.typing.ArrayLike) -> jax.Array:
    """Where an array of the state is, and committed to devices only if that is: else a step would compile again."""
    if not isinstance(now, jax.Array) or (restored.sharding, restored.committed) == (now.sharding, now.committed):
        return restored
    if now.committed:
        return jax.device_put(restored, now.sharding)
    if jnp.issubdtype(now.dtype, jax.dtypes.prng_key):
        data = _placed_like(jax.random.key_data(restored), jax.random.key_data(now))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(now))
    values = np.asarray(restored)  # only what comes from NumPy is not committed
    return jnp.asarray(values.item()) if now.weak_type and not values.ndim else jnp.array(values)
