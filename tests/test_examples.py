"""The examples run as they stand and show what they promise."""

import json
import runpy
from pathlib import Path

import pytest

_EXAMPLES = Path(__file__).parents[1] / "examples"


def test_optax_chain_shifts_after_three_nan_batches_and_trains_on(capsys):
    runpy.run_path(str(_EXAMPLES / "optax_chain.py"), run_name="__main__")
    first, *events = capsys.readouterr().out.splitlines()
    assert first.endswith("in E5M2")
    assert float(first.split()[2]) < 0.5
    assert [(event["step"], event["kind"]) for event in map(json.loads, events)] == [(22, "shift")]


def test_torch_loop_shifts_at_the_same_step(capsys):
    pytest.importorskip("torch")
    runpy.run_path(str(_EXAMPLES / "torch_loop.py"), run_name="__main__")
    shift, final = capsys.readouterr().out.splitlines()
    assert shift == "step 22: shift E7M0 -> E5M2"
    assert float(final.split()[2]) < 0.5


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_heals_itself(framework, capsys):
    pytest.importorskip(framework)
    runpy.run_path(str(_EXAMPLES / f"heal_{framework}.py"), run_name="__main__")
    final, *events = capsys.readouterr().out.splitlines()
    assert final.endswith("in E5M2")
    assert float(final.split()[2]) < 0.3
    happened = [(event["step"], event["kind"], event["cause"]) for event in map(json.loads, events)]
    assert happened == [(62, "shift", "nan"), (110, "rollback", "poisoned weights")]


@pytest.mark.parametrize(
    ("name", "layers", "reached"),
    [("transformer_torch", "encoder.layers.1.linear2", 1.5), ("resnet_torch", "conv2", 0.8)],
)
def test_models_of_torch_train_in_eight_bits(name, layers, reached, capsys):
    pytest.importorskip("torch")
    runpy.run_path(str(_EXAMPLES / f"{name}.py"), run_name="__main__")
    *table, losses, _ = capsys.readouterr().out.splitlines()
    assert any(layers in line and "E4M3" in line and "E5M2" in line for line in table)
    first, last = (float(loss) for loss in losses.removeprefix("loss ").split(" -> "))
    assert last < reached < first


def test_a_model_of_linen_trains_in_eight_bits(capsys):
    runpy.run_path(str(_EXAMPLES / "cnn_linen.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert any("hidden" in line and "E4M3" in line and "E5M2" in line for line in lines)
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert losses[-1] < 0.5 < 2 < losses[0]
