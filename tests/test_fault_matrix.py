"""The pieces of the fault matrix: cases, rows and page, and one tiny run of each framework."""

from __future__ import annotations

import math

import pytest

from altgrad_core.events import Event
from altgrad_jax.data import load_corpus
from altgrad_jax.schedules import Schedule
from benchmarks.faults import in_jax, in_torch, page
from benchmarks.faults.cases import FAULTS, NOISE, STALLED, Case, Outcome, Row, cases, difference, harmless, rows, told
from benchmarks.faults.page import Matrix, written
from benchmarks.faults.processes import ProcessRow

SEEDS = (0, 1)
TORCH = in_torch.Size(steps=22, batch=8, context=4, embedding=4, width=8)


def outcome_of(case: Case) -> Outcome:
    """What a run of the matrix could end with: faults cost a tenth, or everything without interventions."""
    lost = case.fault == "NaN batch" and not case.on
    loss = math.nan if lost else 2.0 + 0.1 * bool(case.fault) * (not case.on) + 0.01 * case.seed
    events = (Event(5, "skip", "nan"),) if case.on and case.fault == "NaN batch" else ()
    return Outcome(loss + 0.004 * (case.learning_rate != 1.0), events)


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    made = Matrix()
    outcomes = {case: outcome_of(case) for case in cases(("E4M3",), SEEDS, "E7M0")}
    made.add("JAX", "A GPT.", outcomes, steps=60, every=5)
    made.processes.append(ProcessRow("SIGKILL", "master", 2.0, "all 9 steps", "3 steps again", 0.0, True))
    return made


def test_every_case_once_with_its_twin() -> None:
    found = cases(("E4M3", "E7M0"), SEEDS, "E7M0")
    assert len(found) == len(set(found)) == 2 * 2 * (len(FAULTS) + 1) * 2 * 2 + 2 * 2 * 2 + 2 * 2
    assert all(Case(case.format, case.storage, "", case.on, case.seed) in found for case in found)
    assert {case.storage for case in found if case.fault == STALLED} == {"committed"}


def test_faults_can_be_read_and_fall_in_the_run() -> None:
    plans = [in_jax.plan(case, Schedule(60)) for case in cases(("E4M3",), SEEDS, "E7M0")]
    assert {injection.step for plan in plans for injection in plan.injections} == {30, 37}
    assert {plan.spec.storage_rounding for plan in plans} == {"nearest_even", "stochastic"}
    assert {plan.shift for plan in plans if plan.spec.recover} == {True}
    assert {plan.shift for plan in plans if not plan.spec.recover} == {False}


def test_rows_are_differences_to_the_twin_of_the_same_seed_and_interventions(matrix: Matrix) -> None:
    by_fault = {(row.fault, row.storage): row for row in matrix.rows["JAX"]}
    nan, spike = by_fault["NaN batch", "master"], by_fault["spike: the loss times 1e4", "committed"]
    assert (nan.twin, nan.on, nan.done, nan.heals) == ((2.005, 2.005), (0.0, 0.0), "skipped 1", True)
    assert all(math.isnan(value) for value in nan.off)
    assert spike.off == pytest.approx((0.1, 0.1))
    assert by_fault[STALLED, "committed"].format == "E7M0"
    assert "0.004 (E4M3 master), 0.004 (E4M3 committed)" in matrix.notes["JAX"]


@pytest.mark.parametrize(
    ("on", "heals"), [((NOISE, NOISE), True), ((NOISE, 1.1 * NOISE), False), ((math.nan, 0), False)]
)
def test_what_heals(on: tuple[float, ...], heals: bool) -> None:
    assert Row("JAX", "E4M3", "master", "NaN batch", (2.0, 2.0), on, on, "").heals is heals


def test_words() -> None:
    shift = Event(3, "shift", "stall", {"from": "E7M0", "to": "E5M2"})
    assert told([[shift, Event(4, "gate", "overflow")], [shift], []]) == "to E5M2 0.67 (stall), clipped 0.33"
    assert told([[]]) == "nothing"
    assert difference((0.25,)) == "+0.250"
    assert difference((math.inf, 0.0)) == "lost: NaN in 1 of 2"


def test_page(matrix: Matrix) -> None:
    lines = written(matrix).splitlines()
    assert (
        "| NaN batch | E4M3 | master | 2.005 / 2.005 | lost: NaN in 2 of 2 | +0.000 ± 0.000 | yes | skipped 1 |"
        in lines
    )
    assert "| SIGKILL | master | 2.000 | all 9 steps | 3 steps again | +0.000 | the twin's, every byte |" in lines
    assert len({line.count("|") for line in lines if line.startswith("| NaN")}) == 1


def test_a_page_keeps_the_sections_that_were_not_measured_again(tmp_path, monkeypatch, matrix: Matrix) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.write(matrix)
    whole = page.PAGE.read_text()
    page.write(Matrix(processes=matrix.processes))
    assert page.PAGE.read_text() == whole
    page.write(Matrix())
    assert page.PAGE.read_text() == whole


@pytest.mark.exhaustive  # trains three fleets: the job's own tests go the same way
def test_a_tiny_matrix_in_jax() -> None:
    wanted = cases(("E4M3",), (0,), "E7M0", faults=("NaN batch",))
    size = in_jax.Size(steps=30, batch=4, context=8, layers=1, width=16, heads=2, snapshot_every=5)
    outcomes = in_jax.outcomes(wanted, size)
    found = {(row.fault, row.storage): row for row in rows("JAX", outcomes)}
    assert math.isnan(found["NaN batch", "master"].off[0])
    assert abs(found["NaN batch", "master"].on[0]) < 0.2
    assert "to stochastic 1 (stall)" in found[STALLED, "committed"].done
    assert all(0 < abs(value) < 0.1 for values in harmless(outcomes).values() for value in values)


@pytest.mark.parametrize(
    ("fault", "done"),
    [
        ("inf in one leaf of the gradient", [("skip", "nan")]),
        ("poisoned weight: NaN", [("rollback", "poisoned weights"), ("skip", "nan"), ("skip", "nan")]),
        ("spike: the loss times 1e4", [("gate", "overflow")]),
    ],
)
def test_a_loop_in_torch_heals(fault: str, done: list[tuple[str, str]]) -> None:
    on = in_torch.train(Case("E4M3", "master", fault, True, 0), load_corpus(None, 4), TORCH)
    assert math.isfinite(on.loss)
    assert sorted((event.kind, event.cause) for event in on.events) == done


def test_a_loop_in_torch_without_interventions_does_not() -> None:
    off = in_torch.train(Case("E4M3", "master", "NaN batch", False, 0), load_corpus(None, 4), TORCH)
    assert math.isnan(off.loss)
    assert off.events == ()


def test_a_stalled_loop_in_torch_is_rounded_stochastically() -> None:
    on = in_torch.train(Case("E7M0", "committed", STALLED, True, 0), load_corpus(None, 4), TORCH)
    assert [(event.kind, event.cause) for event in on.events] == [("rounding", "stall")]
