"""The same observations drive a JAX run and a torch run to the same formats at the same steps, with the same numbers.

Both runs take gradient steps on one quadratic whose weights are used on the grid of the current format, all arithmetic
exact in float32, so that the weights must agree in every bit for as long as the formats do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from altgrad_jax import FormatController, Observation, Policy, get_format, partition_relative_clip, set_format
from altgrad_jax import quantize as jax_quantize
from altgrad_torch import EmergencyMantissaShift, PartitionRelativeClipper
from altgrad_torch import quantize as torch_quantize
from parity_tests.support import as_numpy, to_torch

_TARGET = np.array([0.75, -3.0, 6.5, 1e-3], np.float32)
_RATE = 0.25

Sequence = list[tuple[bool, float]]

_CASES: dict[str, tuple[str, Sequence]] = {
    "three NaN batches": ("E7M0", [(False, 0.0)] * 2 + [(True, 0.0)] * 3 + [(False, 0.0)] * 3),
    "a valid batch resets": ("E0M7", [(True, 0.0), (True, 0.0), (False, 0.0), (True, 0.0), (True, 0.0), (False, 0.1)]),
    "a stall above one half": ("E1M6", [(False, 0.5), (False, 0.5), (False, 0.51), (False, 0.2)]),
    "down the whole chain": ("E2M5", [(False, 0.0)] + [(True, 0.0)] * 9 + [(False, 0.9)] * 3),
    "exhausted": ("E5M2", [(True, 0.0)] * 4 + [(False, 0.9)] * 2),
    "either trigger": ("E2M5", [(True, 0.0), (False, 0.9), (True, 0.0), (True, 0.0), (True, 0.0)]),
}


@dataclass
class _Trace:
    formats: list[str] = field(default_factory=list)
    weights: list[bytes] = field(default_factory=list)


def _run_jax(current: str, sequence: Sequence) -> _Trace:
    # One observation a window and no cooldown: the policy then lets the shifter see everything, as it is.
    policy = Policy("fallback_chain", window=1, warmup=0, cooldown=0)
    controller = FormatController(current, policy=policy, shifter=EmergencyMantissaShift())
    tx = optax.chain(partition_relative_clip(current), optax.scale(-_RATE))
    weights, trace = jnp.zeros(4), _Trace()
    state = tx.init(weights)

    @jax.jit
    def step(weights, state, rate):
        gradient = jax_quantize(weights, get_format(state), overflow="native") - _TARGET
        updates, state = tx.update(gradient, state, weights, overflow_rate=rate)
        return weights + updates, state

    for index, (has_nan, stall_rate) in enumerate(sequence):
        if not has_nan:
            weights, state = step(weights, state, 0.0)
        seen = Observation(index, float("nan") if has_nan else 1.0, finite=not has_nan, stall_rate=stall_rate)
        if controller.observe(seen).acts:
            state = set_format(state, controller.format)
        trace.formats.append(controller.format)
        trace.weights.append(np.asarray(weights).tobytes())
    assert step._cache_size() <= 1
    return trace


def _run_torch(current: str, sequence: Sequence) -> _Trace:
    shifter, trace = EmergencyMantissaShift(), _Trace()
    weights = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weights], lr=_RATE)
    for has_nan, stall_rate in sequence:
        if not has_nan:
            weights.grad = (torch_quantize(weights.detach(), current) - to_torch(_TARGET)).clone()
            assert not PartitionRelativeClipper(current).clip_if_needed([weights], overflow_rate=0.0)
            optimizer.step()
        current = shifter.check_and_shift(current, has_nan, stall_rate) or current
        trace.formats.append(current)
        trace.weights.append(as_numpy(weights).tobytes())
    return trace


@pytest.mark.parametrize("name", _CASES)
def test_same_formats_at_the_same_steps(name):
    current, sequence = _CASES[name]
    ours, theirs = _run_jax(current, sequence), _run_torch(current, sequence)
    assert ours.formats == theirs.formats
    assert ours.weights == theirs.weights


def test_the_cases_shift_where_they_say():
    changes = {
        name: [step for step, (a, b) in enumerate(zip([case[0], *formats], formats, strict=False)) if a != b]
        for name, case in _CASES.items()
        for formats in [_run_torch(*case).formats]
    }
    assert changes == {
        "three NaN batches": [4],
        "a valid batch resets": [],
        "a stall above one half": [2],
        "down the whole chain": [3, 6],
        "exhausted": [],
        "either trigger": [1, 4],
    }
