"""What one process tells all others of ``jax.distributed``, so that all of them do the same at the same step.

It goes through the key-value store of the coordinator. A collective such as ``multihost_utils.broadcast_one_to_all``
would queue up behind the step that the devices are busy with, and have every host wait for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the store has no public name

_PATIENCE = 1800.0
"""Seconds: as long as another process may compile, or write a checkpoint."""
_SWEEP = 256
"""Messages after which those before are thrown away."""
_numbers = itertools.count()


def process_count() -> int:
    """How many processes ``jax.distributed`` has connected; 1 where it is not in use.

    >>> process_count()
    1
    """
    return jax.process_count() if jax.distributed.is_initialized() else 1


class Consensus:
    """A series of messages from process 0 to all processes. Each of them takes part in every one, in the same order.

    >>> Consensus().from_first("E5M2")
    'E5M2'
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._count = 0

    def from_first(self, text: str) -> str:
        """The text of process 0. The others wait for its host, which no device has a part in.

        Args:
            text: that of process 0 counts.

        Returns:
            The same text on all processes.

        Raises:
            TimeoutError: if process 0 does not come to it in half an hour.
        """
        if process_count() == 1:
            return text
        # Counted when first used: processes need not have made the same ones, but use them in the same order.
        self._number = next(_numbers) if self._number is None else self._number
        store: Any = distributed.global_state.client
        sweep, at = divmod(self._count, _SWEEP)
        series = f"altgrad/consensus/{self._number}"
        key = f"{series}/{sweep}/{at}"
        self._count += 1
        if jax.process_index() == 0:
            store.key_value_set(key, text)
        else:
            text = _within(
                lambda limit: store.blocking_key_value_get(key, limit), f"message {self._count} of process 0"
            )
        if at == 0 and sweep > 0:
            _within(lambda limit: store.wait_at_barrier(f"{series}/{sweep}", limit), "the other processes")
            if jax.process_index() == 0:
                store.key_value_delete(f"{series}/{sweep - 1}/")
        return text


def _within(wait: Callable[[int], Any], awaited: str) -> Any:
    try:
        return wait(round(1000 * _PATIENCE))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(
            f"process {jax.process_index()} has waited for {awaited} for {_PATIENCE:g} s; expected all processes to "
            "observe the same steps"
        ) from error
