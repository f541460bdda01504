"""The built-in pair's weights from a safetensors file: every bit, in both frameworks, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file

from altgrad.parity.twins import sides_of
from altgrad.parity.weights import load_weights, save_weights
from altgrad_core.errors import InputError
from altgrad_core.twins import GPTShape, MLPShape, Recipe, Shape
from parity_tests.support import SPECIAL_BITS, TORCH_DEVICE

SHAPES: dict[str, Shape] = {
    "mlp": MLPShape((24, 16, 10), batch=8),
    "gpt": GPTShape(context=8, layers=1, width=16, heads=2, batch=2),
}


@pytest.mark.parametrize("model", SHAPES)
def test_both_frameworks_begin_with_the_bits_of_the_file(model: str, tmp_path: Path) -> None:
    shape, path = SHAPES[model], tmp_path / "weights.safetensors"
    weights = shape.initial_weights(5)
    first = next(iter(weights.values()))
    first.reshape(-1)[: len(SPECIAL_BITS)] = SPECIAL_BITS.view(np.float32)  # subnormals, infinities, NaN with payloads
    save_file(dict(reversed(weights.items())), path)
    in_file = load_file(path)  # by torch's own reader
    loaded = load_weights(path, shape)
    assert list(loaded) == list(weights)
    for make in sides_of(shape, Recipe(), weights=loaded, device=TORCH_DEVICE):
        state, _ = make()
        assert list(state.weights) == list(weights)
        for name, weight in state.weights.items():
            bits = np.asarray(weight.cpu() if hasattr(weight, "cpu") else weight).view(np.int32)
            np.testing.assert_array_equal(bits, in_file[name].numpy().view(np.int32))
            np.testing.assert_array_equal(bits, weights[name].view(np.int32))


def test_saved_weights_are_those(tmp_path: Path) -> None:
    shape, path = SHAPES["mlp"], tmp_path / "weights.safetensors"
    weights = shape.initial_weights(5)
    save_weights(path, {name: np.asfortranarray(weight) for name, weight in weights.items()})
    save_weights(path, {name: np.asfortranarray(weight) for name, weight in weights.items()})  # replaces the other
    for name, weight in load_file(path).items():
        np.testing.assert_array_equal(weight.numpy(), weights[name])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_other_weights_are_refused(tmp_path: Path) -> None:
    shape, path = SHAPES["mlp"], tmp_path / "weights"
    weights = shape.initial_weights(0)
    for other, message in [
        (
            {"layer0.wieght": np.zeros(3, np.float32)},
            "no weight 'layer0.wieght'; did you mean 'layer0.weight'?",
        ),
        ({"xyz": np.zeros(3, np.float32)}, "no weight 'xyz'; Expected layer0.weight, layer0.bias, layer1.weight"),
        ({"layer1.bias": None}, "has no weight 'layer1.bias'; expected F32 of shape (10,)"),
        (
            {"layer0.weight": weights["layer0.weight"].T.copy()},
            "'layer0.weight' is F32 of shape (16, 24); expected F32 of shape (24, 16)",
        ),
        (
            {"layer0.bias": np.zeros(16, np.float16)},
            "'layer0.bias' is F16 of shape (16,); expected F32 of shape (16,)",
        ),
        ({"layer0.bias": np.zeros(16, np.float64)}, "'layer0.bias' is F64"),
    ]:
        save_file({name: each for name, each in {**weights, **other}.items() if each is not None}, path)
        with pytest.raises(InputError, match=re.escape(message)):
            load_weights(path, shape)
        with pytest.raises(InputError, match=re.escape(str(path))):
            load_weights(path, shape)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"is no whole safetensors file \("):
        load_weights(path, shape)
    with pytest.raises(IsADirectoryError):
        load_weights(tmp_path, shape)
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none", shape)
