"""What two trainings have in common that are to be the same, bit for bit: recipe, shapes, initial weights, batches.

One of them is ``altgrad_jax/twins``, the other ``altgrad_torch/twins``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError, check_choice
from altgrad_core.formats import Format, parse

OptimizerName = Literal["sgd", "adamw"]
Storage = Literal["master", "committed"]
"""``master``: float32 weights. ``committed``: each stored on the grid after every step, under the power-of-two scale of
its own amax."""

Accumulation = Literal["exact", "native"]
"""``exact``: products are exact sums, rounded once to float32. ``native``: those of the framework, in float32."""

CommitRounding = Literal["nearest_even", "stochastic"]
Activation = Literal["relu", "gelu"]

Single: TypeAlias = npt.NDArray[np.float32]
Batch: TypeAlias = tuple[npt.NDArray[np.generic], npt.NDArray[np.int32]]
"""What goes in, and what is to come out."""

Batches: TypeAlias = Callable[[int], Batch]
"""The batch of a step: a function of its number alone, so that both trainings see the same."""

_LEARNING_RATES: Mapping[OptimizerName, float] = {"sgd": 0.05, "adamw": 0.003}
_WEIGHT_STREAM, _PROTOTYPE_STREAM, _BATCH_STREAM = range(3)


@dataclass(frozen=True)
class Recipe:
    """How the twins train.

    Args:
        format: name of the format that operands and gradients of all products are cast to, each under the power-of-two
            scale of its own amax: nothing overflows, and a training's state is its weights and moments alone.
        optimizer: SGD with momentum, or AdamW.
        storage: see :data:`Storage`.
        accumulate: see :data:`Accumulation`.
        rounding: of committed weights; stochastic, unless said, with random bits that are a function of ``seed``, step
            and weight.
        learning_rate: 0.05 for SGD and 0.003 for AdamW unless said.
        momentum: of SGD; 0.9 unless said, 0 for none.
        seed: of initial weights, batches and random bits.

    Raises:
        InputError: for an unknown name, a format without a sign, an option without effect, and a number out of range.
    """

    format: str = "E5M2"
    optimizer: OptimizerName = "sgd"
    storage: Storage = "master"
    accumulate: Accumulation = "exact"
    rounding: CommitRounding | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked."""
        for what, name, known in (
            ("optimizer", self.optimizer, OptimizerName),
            ("storage", self.storage, Storage),
            ("accumulation", self.accumulate, Accumulation),
            ("rounding of committed weights", self.rounding or "stochastic", CommitRounding),
        ):
            check_choice(what, name, get_args(known))
        if not self.grid.is_signed:
            raise InputError(f"format is {self.format}, which has no sign; expected one that holds gradients")
        if self.grid.cast_path == "identity" and self.storage == "committed":
            raise InputError(
                f"storage 'committed' would have no effect: float32 is on the grid of {self.grid} as it is"
            )
        if self.rounding is not None and self.storage == "master":
            raise InputError(f"rounding {self.rounding!r} would have no effect: only committed weights are rounded")
        if self.momentum is not None and self.optimizer != "sgd":
            raise InputError(f"momentum {self.momentum} would have no effect: {self.optimizer} has none")
        if not 0 <= (self.momentum or 0) < 1:
            raise InputError(f"momentum is {self.momentum}; expected 0 or more, and less than 1")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(f"the learning rate is {self.learning_rate}; expected a positive number")

    @property
    def grid(self) -> Format:
        """The format."""
        return parse(self.format)

    @property
    def commit_rounding(self) -> CommitRounding:
        """How committed weights are rounded."""
        return self.rounding or "stochastic"

    @property
    def moments(self) -> tuple[str, ...]:
        """What the optimizer keeps of each weight."""
        return ("velocity",) if self.optimizer == "sgd" else ("first", "second")

    def rates(self, step: int) -> dict[str, np.float32]:
        """The optimizer's numbers in a step, counted from 0, computed on the host so that nobody has to take a power.

        >>> {name: float(rate) for name, rate in Recipe(momentum=0.5, learning_rate=0.25).rates(0).items()}
        {'falling': -0.25, 'momentum': 0.5}
        """
        rate = _LEARNING_RATES[self.optimizer] if self.learning_rate is None else self.learning_rate
        if self.optimizer == "sgd":
            named = {"momentum": 0.9 if self.momentum is None else self.momentum}
        else:
            first, second = 0.9, 0.999
            named = {
                "first": first,
                "first_rest": 1 - first,
                "second": second,
                "second_rest": 1 - second,
                "first_correction": 1 / (1 - first ** (step + 1)),
                "root_correction": 1 / math.sqrt(1 - second ** (step + 1)),
                "epsilon": 1e-8,
                "decay": 0.01,
            }
        return {"falling": np.float32(-rate)} | {name: np.float32(value) for name, value in named.items()}


@dataclass(frozen=True)
class MLPShape:
    """A multi-layer perceptron with ReLU and biases, and batches of made-up digits.

    Args:
        sizes: inputs, the hidden layers, classes.
        batch: examples in a batch.

    Raises:
        InputError: for a size that is not positive, and fewer than two.
    """

    sizes: tuple[int, ...] = (784, 512, 512, 10)
    batch: int = 64

    def __post_init__(self) -> None:
        """Check the sizes."""
        if len(self.sizes) < 2:
            raise InputError(f"sizes are {self.sizes}; expected inputs and classes at least")
        _check_positive(batch=self.batch, **{f"sizes[{k}]": size for k, size in enumerate(self.sizes)})

    @property
    def layers(self) -> int:
        """How many products there are in a forward pass."""
        return len(self.sizes) - 1

    def initial_weights(self, seed: int) -> dict[str, Single]:
        """Weights by name, in the order in which they are used.

        >>> {name: weight.shape for name, weight in MLPShape((4, 3, 2)).initial_weights(0).items()}
        {'layer0.weight': (4, 3), 'layer0.bias': (3,), 'layer1.weight': (3, 2), 'layer1.bias': (2,)}
        """
        draw, weights = _generator(seed, _WEIGHT_STREAM), {}
        for layer, (inputs, outputs) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            weights[f"layer{layer}.weight"] = _normal(draw, (inputs, outputs), math.sqrt(2 / inputs))
            weights[f"layer{layer}.bias"] = np.zeros(outputs, np.float32)
        return weights

    def batches(self, seed: int) -> Batches:
        """Noisy copies of one prototype for each class: float32 of shape ``(batch, inputs)`` in [0, 1], and classes.

        >>> images, classes = MLPShape((4, 3, 2), batch=5).batches(0)(0)
        >>> images.shape, classes.dtype
        ((5, 4), dtype('int32'))
        """
        prototypes = _generator(seed, _PROTOTYPE_STREAM).uniform(0, 1, (self.sizes[-1], self.sizes[0])) ** 3

        def batch(step: int) -> Batch:
            draw = _generator(seed, _BATCH_STREAM, step)
            classes = draw.integers(0, self.sizes[-1], self.batch)
            images = prototypes[classes] + draw.normal(0, 0.3, (self.batch, self.sizes[0]))
            return images.clip(0, 1).astype(np.float32), classes.astype(np.int32)

        return batch


@dataclass(frozen=True)
class GPTShape:
    """A decoder-only transformer: learned positions, RMS norms before each part, logits by a matrix of their own.

    Args:
        vocabulary: number of distinct tokens; the text that ships has 68.
        context: tokens in a window.
        layers: transformer blocks.
        width: size of the residual stream.
        heads: attention heads; divides ``width``.
        batch: windows in a batch.
        activation: in a block's MLP, ReLU or GELU, in the tanh form of :mod:`altgrad_core.gelu`.

    Raises:
        InputError: for a number that is not positive, heads that do not divide the width, and an unknown activation.
    """

    vocabulary: int = 68
    context: int = 32
    layers: int = 2
    width: int = 64
    heads: int = 4
    batch: int = 8
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        """Check the shape."""
        _check_positive(
            vocabulary=self.vocabulary, context=self.context, layers=self.layers, width=self.width, heads=self.heads,
            batch=self.batch,
        )  # fmt: skip
        if self.width % self.heads:
            raise InputError(f"heads is {self.heads}; expected a divisor of the width, {self.width}")
        check_choice("activation", self.activation, get_args(Activation))

    def initial_weights(self, seed: int) -> dict[str, Single]:
        """Weights by name, in the order in which they are used.

        >>> list(GPTShape(layers=1).initial_weights(0))[:4]
        ['tokens', 'positions', 'block0.attention_gain', 'block0.qkv']
        """
        draw, width, residual = _generator(seed, _WEIGHT_STREAM), self.width, (2 * self.layers) ** -0.5
        weights = {
            "tokens": _normal(draw, (self.vocabulary, width), 0.5),
            "positions": _normal(draw, (self.context, width), 0.1),
        }
        for layer in range(self.layers):
            block = {
                "attention_gain": np.ones(width, np.float32),
                "qkv": _normal(draw, (width, 3 * width), width**-0.5),
                "proj": _normal(draw, (width, width), residual * width**-0.5),
                "mlp_gain": np.ones(width, np.float32),
                "up": _normal(draw, (width, 4 * width), width**-0.5),
                "down": _normal(draw, (4 * width, width), residual * (4 * width) ** -0.5),
            }
            weights |= {f"block{layer}.{name}": weight for name, weight in block.items()}
        return weights | {
            "gain": np.ones(width, np.float32),
            "logits": _normal(draw, (width, self.vocabulary), 0.5 * width**-0.5),
        }


Shape: TypeAlias = MLPShape | GPTShape


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} is {number}; expected at least 1")


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, *stream])


def _normal(draw: np.random.Generator, shape: tuple[int, ...], deviation: float) -> Single:
    return (draw.normal(size=shape) * deviation).astype(np.float32)
