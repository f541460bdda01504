"""Recovery in torch: steps that leave no trace, weights on the grid, snapshots that come back in place."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad_core.errors import InputError
from altgrad_torch import SkipNonfinite, SnapshotKeeper, all_finite, commit_, reset_moments_
from altgrad_torch.clipping import PartitionRelativeClipper
from altgrad_torch.reading import Reading

BAD = (float("nan"), float("inf"), float("-inf"))


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def give_gradients(to: list[torch.nn.Parameter], seed: int, bad: float | None = None) -> None:
    draw = torch.Generator().manual_seed(seed)
    for each in to:
        each.grad = torch.randn(each.shape, generator=draw)
    if bad is not None:
        to[-1].grad.view(-1)[0] = bad


def everything(optimizer: torch.optim.Optimizer) -> list[Any]:
    weights = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
    states = [sorted(state.items()) for state in optimizer.state.values()]
    return [each.clone() for each in weights] + [value.clone() for state in states for _, value in state]


def assert_same(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- finite


@pytest.mark.parametrize("bad", BAD)
def test_all_finite(bad: float) -> None:
    assert bool(all_finite([torch.ones(3), torch.arange(2), torch.zeros(0, 2), torch.ones(())]))
    assert not bool(all_finite([torch.ones(3), torch.tensor([1.0, bad], dtype=torch.bfloat16)]))
    assert bool(all_finite([torch.arange(2)]))
    model = torch.nn.Linear(2, 2)
    assert bool(all_finite(model))
    model.bias.data[1] = bad
    assert not bool(all_finite(model))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", BAD)
def test_skipped_steps_leave_no_trace(name: str, bad: float) -> None:
    ours, theirs = parameters((3, 2), (4,)), parameters((3, 2), (4,))
    skipping, plain = SkipNonfinite(OPTIMIZERS[name](ours)), OPTIMIZERS[name](theirs)
    seen = []
    for step, is_bad in enumerate((True, False, False, True, True, False, True)):
        give_gradients(ours, step, bad if is_bad else None)
        taken = skipping.step()
        seen.append((bool(taken), int(skipping.consecutive), int(skipping.skipped)))
        assert bool(skipping.finite) is bool(taken) is not is_bad
        if not is_bad:
            give_gradients(theirs, step)
            plain.step()
            assert_same(everything(skipping.optimizer), everything(plain))
    assert_same(everything(skipping.optimizer), everything(plain))
    assert [each[1:] for each in seen] == [(1, 1), (0, 1), (0, 1), (1, 2), (2, 3), (0, 3), (1, 4)]
    again = SkipNonfinite(skipping.optimizer)
    again.load_state_dict(skipping.state_dict())
    assert (int(again.consecutive), int(again.skipped), bool(again.finite)) == (1, 4, False)


def test_a_fused_optimizer_is_told_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = parameters((3,))
    skipping = SkipNonfinite(torch.optim.AdamW(weights, fused=True))
    give_gradients(weights, 0, bad=float("nan"))

    def refuse(_: torch.Tensor) -> bool:
        raise AssertionError("the host read a tensor")

    monkeypatch.setattr(torch.Tensor, "__bool__", refuse)
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    skipping.step()


def test_with_a_gradient_scaler() -> None:
    weights = parameters((3,))
    before = weights[0].detach().clone()
    skipping, scaler = SkipNonfinite(torch.optim.SGD(weights, lr=1.0)), torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (True, False):
        skipping.optimizer.zero_grad()
        scaler.scale(weights[0].sum() * (float("inf") if bad else 1.0)).backward()
        scaler.unscale_(skipping.optimizer)
        assert bool(skipping.step()) is not bad
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert torch.equal(weights[0].detach(), before if bad else before - 1)


# ---- new moments


def test_new_moments_make_the_first_step_of_a_new_optimizer() -> None:
    ours, theirs = parameters((3,)), parameters((3,))
    worn = torch.optim.AdamW(ours, lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(worn, 0.5)
    for step in range(3):
        give_gradients(ours, step)
        worn.step()
        schedule.step()
    reset_moments_(worn)
    theirs[0].data.copy_(ours[0].data)
    fresh = torch.optim.AdamW(theirs, lr=0.1 * 0.5**3)
    for weights, optimizer in ((ours, worn), (theirs, fresh)):
        give_gradients(weights, 9)
        optimizer.step()
    assert_same(everything(worn), everything(fresh))


# ---- commit_


def test_commit_takes_a_module_and_keeps_its_parameters() -> None:
    model = torch.nn.Linear(4, 3)
    weight = model.weight
    commit_(model, "E5M2")
    assert model.weight is weight
    once = weight.detach().clone()
    commit_(model, "E5M2")
    assert torch.equal(weight, once)
    assert len(set(once.view(-1).tolist())) > 3


def test_bad_commits() -> None:
    weights = parameters((3,), (2,))
    before = [each.detach().clone() for each in weights]
    with pytest.raises(InputError, match="seed is None with rounding='stochastic'; expected a seed"):
        commit_(weights, "E5M2", rounding="stochastic")
    with pytest.raises(InputError, match="seed is 1 with rounding='nearest_even'; expected none"):
        commit_(weights, "E5M2", seed=1)
    with pytest.raises(InputError, match="seed is -1; expected an integer"):
        commit_(weights, "E5M2", rounding="stochastic", seed=-1)
    with pytest.raises(TypeError, match="int32"):
        commit_([weights[0], torch.zeros(3, dtype=torch.int32)], "E5M2")
    assert_same(before, [each.detach() for each in weights])  # nothing is stored of what fails half way


# ---- snapshots


class Trained:
    """A model with a buffer, an optimizer and a clipper, and what they all hold."""

    def __init__(self, fused: bool = False) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, fused=fused)
        self.clipper = PartitionRelativeClipper("E5M2", rule="scaled_max", overflow_threshold=0.0)

    def step(self, number: int) -> None:
        batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        self.model(batch).square().mean().backward()
        self.clipper.clip_if_needed(self.model, overflow_rate=0.0)
        self.optimizer.step()

    def held(self) -> list[Any]:
        amaxes = [torch.tensor(each) for _, each in sorted(self.clipper.state_dict()[".*"]["amaxes"].items())]
        buffers = [each.clone() for each in self.model.buffers()]
        return [*everything(self.optimizer), *buffers, *amaxes]


WHERE = ("device", "host")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_goes_back_in_place_and_on_as_it_did(where: Any, fused: bool) -> None:
    run = Trained(fused)
    identities = [id(each) for each in [*run.model.parameters(), *run.model.buffers()]]
    keeper = SnapshotKeeper(run.model, run.optimizer, run.clipper, every=2, keep=2, where=where)
    held = {}
    for step in range(1, 10):
        run.step(step)
        held[step] = run.held()
        keeper.offer(step, torch.tensor(step != 8))
    run.model[0].weight.data[0, 0] = float("nan")
    run.optimizer.param_groups[0]["lr"] = 0.01
    keeper.roll_back()
    assert_same(run.held(), held[4])  # 4 and 6 were kept
    assert [id(each) for each in [*run.model.parameters(), *run.model.buffers()]] == identities
    assert run.optimizer.param_groups[0]["lr"] == 0.01
    run.optimizer.param_groups[0]["lr"] = 0.05
    for step in range(5, 8):
        run.step(step)
        assert_same(run.held(), held[step])
    keeper.roll_back(back=1)
    assert_same(run.held(), held[4])


@pytest.mark.parametrize("where", WHERE)
def test_the_start_has_no_moments_and_they_may_come_back(where: Any) -> None:
    run = Trained()
    start = run.held()
    keeper = SnapshotKeeper(run.model, run.optimizer, run.clipper, every=1, where=where)
    run.step(1)
    first = run.held()
    keeper.offer(1)
    keeper.roll_back(back=2)
    assert_same(run.held(), start)
    run.step(1)
    assert_same(run.held(), first)
    run.step(2)
    keeper = SnapshotKeeper(run.model, run.optimizer, where=where)
    run.step(3)
    keeper.roll_back(moments="reset")
    assert not run.optimizer.state
    keeper.roll_back()
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {2}
    assert len(run.optimizer.state) == len(list(run.model.parameters()))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_snapshots_are_those_that_were_kept_whatever_memory_they_are_written_to(where: Any, keep: int) -> None:
    """Bad ones between good ones, rollbacks between both; against a list of values."""
    rng = np.random.default_rng(keep)
    model = torch.nn.Linear(3, 2)
    keeper = SnapshotKeeper(model, every=1, keep=keep, where=where)
    kept = [model.weight.detach().clone()] * keep
    for step in range(1, 60):
        model.weight.data.fill_(step)
        good = bool(rng.random() < 0.6)
        keeper.offer(step, torch.tensor(good))
        kept = [*kept, model.weight.detach().clone()][-keep:] if good else kept
        model.weight.data.fill_(-1)
        if rng.random() < 0.3:
            back = int(rng.integers(1, keep + 1))
            keeper.roll_back(back)
            assert torch.equal(model.weight, kept[keep - back])
            kept[keep - back :] = [kept[keep - back]] * back


class Clones(TorchDispatchMode):
    """Counts new copies of tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.clone.default, torch.ops.aten.empty.memory_format)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("good", [True, torch.tensor(False)])
def test_memory_of_snapshots_is_written_again(where: Any, good: Any) -> None:
    run = Trained()
    run.step(1)
    keeper = SnapshotKeeper(run.model, run.optimizer, every=1, keep=2, where=where)
    with Clones() as seen:
        for step in range(1, 4):
            keeper.offer(step, good)
        assert seen.count > 0
        # Once more, because whether a snapshot is good is asked for with the next.
        keeper.offer(4, good)
        before = seen.count
        for step in range(5, 9):
            keeper.offer(step, good)
        assert seen.count - before <= 4  # the readings of whether they were good


class Exposed:
    """Hands out its state itself, and takes up what it is given as it is."""

    def __init__(self) -> None:
        self.held = {"seen": torch.zeros(1)}

    def state_dict(self) -> dict[str, Any]:
        return self.held

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = state_dict


def test_what_hands_out_its_state_itself_is_copied() -> None:
    holder = Exposed()
    keeper = SnapshotKeeper(holder)
    for _ in range(2):
        holder.held["seen"] += 1
        keeper.roll_back()
        assert holder.held["seen"].item() == 0.0


def test_what_cannot_be_kept() -> None:
    model = torch.nn.Linear(2, 1)
    for settings, told in (
        ({"every": 0}, "every is 0; expected an integer of at least 1"),
        ({"keep": 0}, "keep is 0; expected an integer of at least 1"),
        ({"where": "disk"}, "where is 'disk'; expected 'device' or 'host'"),
    ):
        with pytest.raises(InputError, match=told):
            SnapshotKeeper(model, **settings)
    keeper = SnapshotKeeper(model)
    with pytest.raises(InputError, match="back is 3; expected 1, the newest snapshot, to 2"):
        keeper.roll_back(back=3)
    with pytest.raises(InputError, match="moments is 'new'; expected 'kept' or 'reset'"):
        keeper.roll_back(moments="new")  # pyrefly: ignore[bad-argument-type]
    model.register_buffer("extra", torch.zeros(1))
    with pytest.raises(InputError, match=r"the module holds .*'extra'.*expected what it held"):
        keeper.roll_back()


def test_a_reading_is_what_was_there_when_it_was_taken() -> None:
    loss = torch.tensor(0.5, requires_grad=True)
    reading = Reading({"loss": loss * 1, "rate": 0.25, "finite": torch.tensor([True]), "n": torch.tensor(3)})
    loss.data.fill_(7.0)
    flag = torch.tensor(1.0, dtype=torch.float64)
    later = Reading({"flag": flag})
    flag.fill_(0.0)
    assert reading.read() == {"loss": 0.5, "rate": 0.25, "finite": 1.0, "n": 3.0}
    assert later.read() == {"flag": 1.0}
    assert Reading({}).read() == {}


def test_sparse_gradients_are_looked_at() -> None:
    layer = torch.nn.Embedding(10, 4, sparse=True)
    skipping = SkipNonfinite(torch.optim.SparseAdam(layer.parameters(), lr=0.5))
    for factor, taken in ((1.0, True), (float("inf"), False)):
        layer.zero_grad()
        before = layer.weight.detach().clone()
        (layer(torch.tensor([1, 2])) * factor).sum().backward()
        assert bool(skipping.step()) is taken
        assert torch.equal(layer.weight, before) is not taken
