"""``python -m benchmarks.faults [--write] [jax] [torch] [processes]``: the fault matrix, or some parts of it."""

from __future__ import annotations

import os
import sys
import time

# Before jax is imported: a fleet's runs go side by side on as many devices.
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={min(os.cpu_count() or 1, 16)}")

import torch

from benchmarks.faults import in_jax, in_torch, processes
from benchmarks.faults.cases import cases
from benchmarks.faults.page import Matrix, write, written

SEEDS = (0, 1, 2)
STALLED_FORMAT = "E7M0"


def main() -> None:
    arguments = sys.argv[1:]
    parts = {"jax": _jax, "torch": _torch, "processes": _processes}
    unknown = [each for each in arguments if each not in (*parts, "--write")]
    if unknown:
        sys.exit(f"no part {unknown[0]!r}; expected some of {', '.join(parts)}, or --write")
    chosen = [each for each in arguments if each in parts] or list(parts)
    matrix = Matrix()
    for name in chosen:
        began = time.monotonic()
        parts[name](matrix)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(written(matrix))
    if "--write" in arguments:
        print(write(matrix), file=sys.stderr)


def _jax(matrix: Matrix) -> None:
    wanted = cases(("E4M3", STALLED_FORMAT), SEEDS, STALLED_FORMAT)
    size = in_jax.Size()
    about = "A character GPT of one block, 32 wide: `altgrad_jax`'s training job."
    matrix.add("JAX", about, in_jax.outcomes(wanted, size), size.steps, size.snapshot_every)


def _torch(matrix: Matrix) -> None:
    torch.set_num_threads(1)  # the tensors are small, and threads would wait for each other
    wanted = cases(("E4M3",), SEEDS, STALLED_FORMAT)
    size = in_torch.Size()
    about = (
        f"A character perceptron, 64 wide, batches of {size.batch}: a loop of one's own on `altgrad_torch`'s pieces. "
        "This is the second size tried: with 160 steps, batches of 64 and snapshots every 20 steps, while the loss "
        "still fell steeply, 10 of these 19 rows were not healed, by 0.06 to 0.13 nats. What a rollback costs hangs "
        "on that."
    )
    matrix.add("torch", about, in_torch.outcomes(wanted, size), size.steps, size.snapshot_every)


def _processes(matrix: Matrix) -> None:
    matrix.processes.extend(processes.rows())


main()
