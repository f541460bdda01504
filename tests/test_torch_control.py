"""The controller in a torch loop: formats written where they are held, and what it refuses."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from altgrad_core import UnknownFormatError, parse
from altgrad_core.errors import InputError
from altgrad_torch import (
    BitStallDetector,
    EmergencyMantissaShift,
    FormatController,
    FormatParams,
    PartitionRelativeClipper,
    Policy,
    clip_threshold,
    quantize,
    set_format,
)


class Casting(torch.nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.format = held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantize(x, self.format)


def test_formats_are_written_in_place_wherever_they_are_held() -> None:
    model = torch.nn.Sequential(Casting("E7M0"), Casting(parse("E7M0")), Casting(FormatParams.from_format("E7M0")))
    params, held = FormatParams.from_format("E7M0", path="wide"), model[2].format
    clipper, detector = PartitionRelativeClipper("E7M0", base_clip=2.0), BitStallDetector("E7M0")
    set_format([model, params, clipper, detector], "E3M4")
    assert (model[0].format, model[1].format, detector.format) == ("E3M4", parse("E3M4"), parse("E3M4"))
    assert model[2].format is held
    expected = FormatParams.from_format("E3M4")
    for written, path in ((held, "fast"), (params, "wide")):
        assert all(torch.equal(a, b) for a, b in zip(written, expected, strict=True))
        assert written.path == path
    assert (clipper.format, clipper.clip_threshold) == (parse("E3M4"), clip_threshold("E3M4", 2.0))
    assert model(torch.tensor(1000.0)).item() == 124.0


def test_a_clipper_with_groups_and_memory_changes_its_format_and_forgets_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    clipper = PartitionRelativeClipper({"weight": "E5M2", ".*": "E4M3"}, rule="quantile")
    for _ in range(9):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        clipper.clip_if_needed(model, overflow_rate=0.0)
    remembered = clipper.state_dict()
    set_format([clipper], "E3M4")
    assert {group.format for group in clipper.groups.values()} == {parse("E3M4")}
    assert clipper.state_dict() == remembered
    clipper.clip_if_needed(model, overflow_rate=0.0)
    assert clipper.groups["weight"].clip_threshold == 2.0  # a quantile knows no format


def test_what_holds_no_format_is_refused() -> None:
    for holder, name in ((torch.nn.Linear(2, 2), "Linear"), (object(), "object"), (Casting(3), "Casting")):
        with pytest.raises(InputError, match=f"a {name} holds no format"):
            set_format([holder], "E5M2")
    with pytest.raises(InputError, match="path 'fast' cannot cast to bf16"):
        set_format(FormatParams.from_format("E5M2"), "bf16")
    detector = BitStallDetector("E7M0")
    with pytest.raises(UnknownFormatError):
        set_format([detector], "E77M0")
    assert detector.format == parse("E7M0")


def controller(**more: Any) -> FormatController:
    return FormatController("E7M0", policy="off", shifter=EmergencyMantissaShift(), **more)


NAN = {"loss": torch.tensor(torch.nan), "finite": torch.tensor(False)}


def test_decisions_land_a_step_late_and_draining_decides_on_the_last() -> None:
    early, late = controller(), controller()
    assert [early.step(step, NAN).format for step in range(3)] == [None, None, None]
    assert early.drain().format == "E5M2"
    assert early.drain().format is None
    detector = BitStallDetector("E7M0")
    decisions = [late.step(step, NAN, [detector]) for step in range(5)]
    assert [each.format for each in decisions] == [None, None, None, "E5M2", None]
    assert (str(detector.format), late.format, late.events[0].step) == ("E5M2", "E5M2", 2)


def test_the_step_in_flight_is_not_judged() -> None:
    falling = FormatController("E0M7", policy="off", shifter=EmergencyMantissaShift())
    decisions = [falling.step(step, NAN).format for step in range(8)]
    assert decisions == [None, None, None, "E3M4", None, None, None, "E5M2"]  # steps 0 to 2, then 4 to 6


def test_rollbacks_are_carried_out_before_the_format_is_written() -> None:
    keeping, detector, happened = controller(can_roll_back=True), BitStallDetector("E7M0"), []

    def roll_back() -> None:
        happened.append(str(detector.format))
        detector.format = parse("E7M0")  # as a snapshot may

    poisoned = {**NAN, "params_finite": torch.tensor(False)}
    calm = {"loss": torch.tensor(1.0), "finite": torch.tensor(True)}
    for step, metrics in enumerate([NAN, NAN, poisoned, NAN, calm, poisoned, calm]):
        keeping.step(step, metrics, [detector], roll_back)
    assert [event.kind for event in keeping.events] == ["rollback", "shift", "rollback"]
    assert (happened, str(detector.format)) == (["E7M0", "E5M2"], "E5M2")


def test_a_layer_moves_alone() -> None:
    policy = Policy("by_cause", window=1, warmup=0)
    layers = FormatController({"mlp": "E4M3", "logits": "E4M3"}, policy=policy, shifter=EmergencyMantissaShift())
    clipper, held = PartitionRelativeClipper("E4M3"), {"mlp": [Casting("E4M3")], "logits": [Casting("E4M3")]}
    calm = {"loss": torch.tensor(1.0), "finite": torch.tensor(True), "mlp/overflow_rate": torch.tensor(0.0)}
    for step in range(3):
        layers.step(step, {**calm, "logits/overflow_rate": 0.25}, [clipper], layers=held)
    assert {layer: each.format for layer, (each,) in held.items()} == {"mlp": "E4M3", "logits": "E5M2"}
    assert str(clipper.format) == layers.format == "E4M3"
    for given, told in ((None, "layers are none"), ({"mlp": [], "logit": []}, "layers are mlp, logit")):
        with pytest.raises(InputError, match=f"{told}; expected those of the controller: mlp, logits"):
            layers.step(3, calm, layers=given)
    with pytest.raises(InputError, match="layers are mlp; expected those of the controller: none"):
        controller().drain(layers={"mlp": []})


@pytest.mark.parametrize(
    ("settings", "roll_back", "told"),
    [
        ({"rounding": "nearest_even"}, None, "cannot change how weights are rounded"),
        ({"learning_rate": 1.0}, None, "cannot change the learning rate"),
        ({"scales": "static"}, None, "cannot change where scales come from"),
        ({"can_roll_back": True}, None, "can_roll_back is True but roll_back is None"),
        ({}, lambda: None, "can_roll_back is False but roll_back is"),
    ],
)
def test_what_step_cannot_carry_out_is_refused_beforehand(settings: Any, roll_back: Any, told: str) -> None:
    for call in (lambda each: each.step(0, NAN, (), roll_back), lambda each: each.drain((), roll_back)):
        with pytest.raises(InputError, match=told):
            call(controller(**settings))


def test_a_rollback_leaves_formats_alone_until_there_was_a_shift() -> None:
    clipper = PartitionRelativeClipper({"weight": "E3M4", ".*": "E5M2"})
    calm, shifting = FormatController("E5M2", can_roll_back=True), controller(can_roll_back=True)
    fine = {"loss": torch.tensor(1.0), "finite": torch.tensor(True)}
    for step, metrics in enumerate([fine, {**fine, "params_finite": torch.tensor(False)}, fine]):
        calm.step(step, metrics, [clipper], lambda: None)
    assert [event.kind for event in calm.events] == ["rollback"]
    assert [str(group.format) for group in clipper.groups.values()] == ["E3M4", "E5M2"]
    for step in range(4):
        shifting.step(step, NAN, [clipper], lambda: None)
    assert [str(group.format) for group in clipper.groups.values()] == ["E5M2", "E5M2"]


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_loop_of_ones_own_resumes_across_a_shift(cut: int) -> None:
    fine = {"loss": torch.tensor(0.1), "finite": torch.tensor(True), "stall_rate": torch.tensor(0.3).bfloat16()}
    courses = [fine, fine, NAN, NAN, NAN, fine, fine, fine]
    whole, first, second = controller(), controller(), controller()
    expected = [whole.step(step, each).format for step, each in enumerate(courses)]
    assert expected == [None] * 5 + ["E5M2"] + [None] * 2
    before = [first.step(step, each).format for step, each in enumerate(courses[:cut])]
    second.restore(json.loads(json.dumps(first.saved(), allow_nan=False)))
    assert before + [second.step(step, each).format for step, each in enumerate(courses[cut:], cut)] == expected
    assert (second.events, second.saved()) == (whole.events, whole.saved())


MANY = {"per_layer": torch.ones(3), "names": ["a"], "applied": None, "lr": 0.1}
KINDS: dict[str, Any] = {
    "tensors": torch.tensor,
    "one element": lambda value: torch.tensor([value]),
    "python": lambda value: value,
    "numpy": lambda value: np.array([value], np.float32),
    "numpy scalar": np.float32,
}


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_may_be_any_numbers_and_more_than_is_read(kind: str) -> None:
    eager = FormatController("E4M3", policy=Policy(window=1, warmup=0), shifter=EmergencyMantissaShift())
    numbers = {"loss": 1.0, "finite": True, "params_finite": True, "norm": 2.0, "overflow_rate": 0.5}
    metrics = {name: KINDS[kind](value) for name, value in numbers.items()}
    for step in range(2):
        eager.step(step, {**metrics, **MANY, "worst_overflow_site": "logits"})
    (event,) = eager.events
    assert (event.kind, event.numbers["overflow_rate"], event.numbers["worst_overflow_site"]) == (
        "shift",
        0.5,
        "logits",
    )


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("norm", torch.ones(3), r"metric 'norm' has the shape \(3,\); expected one number"),
        ("mlp/overflow_rate", torch.ones(2, 1), r"metric 'mlp/overflow_rate' has the shape \(2, 1\)"),
        ("loss", "high", "metric 'loss' is 'high'; expected one number"),
        ("norm", None, "metric 'norm' is None; expected one number"),
    ],
)
def test_metrics_that_are_no_single_number_are_refused_at_once(name: str, value: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        controller().step(0, {"loss": 1.0, "finite": True, name: value})


def test_holders_come_in_a_list() -> None:
    told = r"holders are a {}; expected them in a list, also where there is one"
    sequential = torch.nn.Sequential(Casting("E7M0"))
    alone = [(PartitionRelativeClipper("E7M0"), "PartitionRelativeClipper"), (Casting("E7M0"), "Casting")]
    for holder, name in [*alone, (sequential, "Sequential"), ("E7M0", "str"), (None, "NoneType")]:
        with pytest.raises(InputError, match=told.format(name)):
            set_format(holder, "E5M2")
        with pytest.raises(InputError, match=told.format(name)):
            controller().step(0, NAN, holder)
        with pytest.raises(InputError, match=told.format(name)):
            controller().drain(holder)
    for none in ([], iter(())):
        with pytest.raises(InputError, match="there are no holders to write a format into; expected at least one"):
            set_format(none, "E5M2")
    set_format((each for each in [sequential]), "E5M2")
    assert sequential[0].format == "E5M2"
    params = FormatParams.from_format("E7M0")
    following = controller()
    for step in range(4):
        following.step(step, NAN, params)
    assert params.max_value.item() == 57344.0
