"""Two trainings side by side: where they part, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from altgrad.parity import Environment, Make, assert_in_lockstep, lockstep, made_by
from altgrad_core.errors import InputError

RATE = 0.1
LABELS = ("jax", "torch")


def data(size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Weights and gradients that no multiply-add treats alike."""
    generator = np.random.default_rng(0)
    return generator.normal(size=size).astype(np.float32), generator.normal(size=size).astype(np.float32)


def in_jax() -> tuple[jax.Array, object]:
    """Gradient descent on half the squared distance to a target; the update is a multiply-add, which XLA fuses."""
    start, target = data()

    @jax.jit
    def update(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        grad = w - target
        return w + grad * np.float32(-RATE), grad

    def step(w: jax.Array, k: int) -> tuple[jax.Array, Mapping[str, object]]:
        new, grad = update(w)
        return new, {"grad": grad, "w": made_by(new, "multiply_add", x=grad, y=np.float32(-RATE), z=w)}

    return jnp.asarray(start), step


def in_torch() -> tuple[torch.Tensor, object]:
    start, target = map(torch.from_numpy, data())

    def step(w: torch.Tensor, k: int) -> tuple[torch.Tensor, Mapping[str, object]]:
        grad = w - target
        new = w + grad * -RATE
        return new, {"grad": grad, "w": made_by(new, "multiply_add", x=grad, y=np.float32(-RATE), z=w)}

    return start, step


def in_torch_fused() -> tuple[torch.Tensor, object]:
    """addcmul rounds once, too."""
    start, target = map(torch.from_numpy, data())
    rate = torch.full_like(start, -RATE)

    def step(w: torch.Tensor, k: int) -> tuple[torch.Tensor, Mapping[str, object]]:
        grad = w - target
        new = torch.addcmul(w, grad, rate)
        return new, {"grad": grad, "w": new}

    return start, step


def test_the_first_difference_and_its_cause() -> None:
    found = lockstep(in_jax, in_torch, steps=20, labels=LABELS)
    assert not found.passed
    assert [repeat.passed for repeat in found.repeats] == [True, True]
    assert [repeat.identical_steps for repeat in found.repeats] == [20, 20]
    assert (found.steps, found.identical_steps) == (1, 0)
    first = found.first_difference
    assert first is not None
    assert (first.step, first.tensor.name, first.cause.names) == (0, "w", ("fused multiply-add",))
    assert "cause: fused multiply-add: jax rounded once; torch rounded twice" in str(found)


def test_the_same_bits_over_many_steps() -> None:
    found = lockstep(in_jax, in_torch_fused, steps=20, labels=LABELS)
    assert found.passed
    assert (found.steps, found.identical_steps, found.first_difference) == (20, 20, None)
    assert str(found) == "jax against torch: 20 of 20 steps identical"
    assert_in_lockstep(in_jax, in_torch_fused, steps=2, repeat_steps=0)


def test_within_a_tolerance() -> None:
    found = lockstep(in_jax, in_torch, steps=5, tolerance_ulps={"w": 64, ".*": 200}, labels=LABELS)
    assert found.passed
    assert found.identical_steps < found.steps == 5
    assert found.run is not None
    assert 1 <= found.run.largest_ulps <= 200
    assert str(found).endswith("steps identical, all within tolerance")


def evaluating(value: float, weight: float = 0.0) -> Make[None]:
    """A side with a tensor that only its third step has."""

    def step(state: None, k: int) -> tuple[None, Mapping[str, object]]:
        seen = {"loss": np.float32(weight)}
        return None, seen | ({"eval.loss": np.float32(value)} if k == 2 else {})

    return lambda: (None, step)


def test_a_tolerance_for_a_tensor_that_only_some_steps_have() -> None:
    sides, allowed = (evaluating(1), evaluating(1 + 2**-22)), {"eval.*": 2}
    assert lockstep(*sides, steps=4, tolerance_ulps=allowed).passed
    assert lockstep(*sides, steps=4, tolerance_ulps=allowed, repeat_steps=0).passed
    assert not lockstep(*sides, steps=4, tolerance_ulps={"eval.*": 1}).passed
    with pytest.raises(InputError, match=r"'eval.*', which matches no tensor"):
        lockstep(*sides, steps=2, tolerance_ulps=allowed)


def test_a_run_that_parts_before_a_tolerance_matches() -> None:
    """Where the sides' own runs came that far, it is no mistake; where they did not, what was found is told, too."""
    sides, allowed = (evaluating(1), evaluating(1, weight=1)), {"eval.*": 2}
    first = lockstep(*sides, steps=4, tolerance_ulps=allowed).first_difference
    assert first is not None
    assert (first.step, first.tensor.name) == (0, "loss")
    with pytest.raises(InputError, match=r"'eval.*', which matches no tensor.*; step 0: loss differs in 1 of 1"):
        lockstep(*sides, steps=4, tolerance_ulps=allowed, repeat_steps=0)


def test_a_tolerance_of_numpy_is_written() -> None:
    for tolerance, written in ((np.int64(2), 2), ({"w": np.int64(2)}, {"w": 2})):
        found = lockstep(counting({"w": {}}), counting({"w": {}}), steps=1, tolerance_ulps=tolerance)
        assert json.loads(json.dumps(found.as_dict()))["tolerance_ulps"] == written


def test_what_is_written() -> None:
    found = lockstep(in_jax, in_torch, steps=3, labels=LABELS).as_dict()
    text = json.dumps(found, allow_nan=False)
    read = json.loads(text)
    assert (read["steps"], read["identical_steps"], read["passed"]) == (1, 0, False)
    first = read["first_difference"]
    assert (first["step"], first["tensor"], first["cause"]) == (0, "w", "fused multiply-add")
    assert first["ulps"] >= 1
    assert first["record"]["first"]["bits"][0].startswith("0x")
    assert [repeat["labels"] for repeat in read["repeats"]] == [["jax", "jax again"], ["torch", "torch again"]]
    assert {"versions", "instruction_sets", "threads", "settings", "cores"} <= set(read["environment"])


def counting(values: Mapping[str, Mapping[int, float]]) -> Make[None]:
    """A side whose named tensors are 0 but at the given steps."""

    def step(state: None, k: int) -> tuple[None, Mapping[str, object]]:
        return None, {name: np.float32(at.get(k, 0)) for name, at in values.items()}

    return lambda: (None, step)


def test_the_first_tensor_is_the_first_of_its_step() -> None:
    """Order within the step is that of the mapping, not of the names."""
    still = {"z": {}, "m": {}, "a": {}}
    found = lockstep(counting(still), counting({**still, "m": {4: 1}, "a": {3: 1, 4: 1}, "z": {4: 1}}), steps=9)
    assert found.first_difference is not None
    assert (found.first_difference.step, found.first_difference.tensor.name) == (3, "a")
    assert (found.steps, found.identical_steps) == (4, 3)
    found = lockstep(counting(still), counting({**still, "m": {4: 1}, "a": {4: 1}}), steps=9)
    assert found.first_difference is not None
    assert found.first_difference.tensor.name == "m"


def test_a_side_that_does_not_repeat_itself_ends_it() -> None:
    shared = np.zeros(3, np.float32)  # what make should have built anew

    def make() -> tuple[np.ndarray, object]:
        def step(w: np.ndarray, k: int) -> tuple[np.ndarray, Mapping[str, object]]:
            w += 1
            return w, {"w": w.copy()}

        return shared, step

    for sides, labels in (((make, in_jax), ("bad", "good")), ((in_jax, make), ("good", "bad"))):
        found = lockstep(*sides, steps=3, labels=labels)
        assert not found.passed
        assert found.run is None
        assert str(found).startswith("bad does not repeat itself. bad against bad again: 0 of 1 steps identical")
    with pytest.raises(AssertionError, match="does not repeat itself"):
        assert_in_lockstep(make, make, steps=2)


def test_a_tensor_that_one_side_lacks() -> None:
    found = lockstep(counting({"loss": {}, "w": {}}), counting({"los": {}, "w": {}}), steps=3)
    assert found.first_difference is not None
    assert found.first_difference.cause.name == "missing"
    assert "loss is missing in b; the nearest name there is 'los'" in str(found)


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (lambda: None, {}, "make of a returned None; expected a state and a step"),
        (lambda: (0, 0), {}, "make of a returned"),
        (lambda: (0, lambda state, k: {}), {}, r"step 0 of a returned \{\}; expected \(state, tensors by name\)"),
        (lambda: (0, lambda state, k: (state, {})), {}, "at least one"),
        (lambda: (0, lambda state, k: (state, {"w": None})), {}, "without a tensor; expected one"),
        (lambda: (0, lambda state, k: (state, {"w": "x"})), {}, "w holds 'x'"),
        (in_jax, {"steps": 0}, "steps is 0; expected a whole number of at least 1"),
        (in_jax, {"repeat_steps": -1}, "repeat_steps is -1"),
        (in_jax, {"ignore": ("nan payloads",)}, "did you mean 'nan payload'"),
        (in_jax, {"tolerance_ulps": {"v": 1}, "repeat_steps": 0, "steps": 1}, "'v', which matches no tensor"),
    ],
)
def test_bad_input_is_named(make: Make[object], options: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        lockstep(make, make, **options)


def test_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    here = Environment.here()
    assert here.versions["torch"] == torch.__version__
    assert here.versions["jax"] == jax.__version__
    assert here.threads == {"torch": torch.get_num_threads()}
    assert here.settings["XLA_FLAGS"] == "--xla_cpu_max_isa=AVX2"
    assert here.settings["jax_enable_x64"] == "False"
    json.dumps(here.as_dict())


def test_a_misspelt_tolerance_is_told_once_a_side_has_run() -> None:
    started: list[str] = []

    def side(label: str) -> Any:
        def make() -> Any:
            started.append(label)
            return np.float32(0), lambda state, k: (state, {"weights": state})

        return make

    with pytest.raises(InputError, match="'wieghts', which matches no tensor; the nearest is 'weights'"):
        lockstep(side("a"), side("b"), steps=3, tolerance_ulps={"wieghts": 1})
    assert started == ["a", "a"]
