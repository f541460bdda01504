"""Test files that run again as processes of their own: with other devices, or as several that talk to each other."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A port on loopback that was free a moment ago."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def results_of(
    module: str, count: int = 1, *, environment: Mapping[str, str] | None = None, timeout: float = 120
) -> list[Any]:
    """Run ``python -m module RANK COUNT PORT FILE`` for each rank at once; return what each wrote to its file, as JSON.

    What counts is the file: a process may still fail when it takes down its connections. All of them end with the call,
    and what they said is in the error.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = [Path(folder) / f"{rank}.json" for rank in range(count)]
        logs = [stack.enter_context(open(file.with_suffix(".log"), "w+")) for file in files]
        running = [
            subprocess.Popen(
                [sys.executable, "-W", "error", "-m", module, str(rank), str(count), str(port), str(file)],
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, (file, log) in enumerate(zip(files, logs, strict=True))
        ]
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in running) and time.monotonic() < deadline:
                time.sleep(0.05)
                if any(process.poll() and not file.exists() for process, file in zip(running, files, strict=True)):
                    break  # the others would wait for it
        finally:
            for process in running:
                process.kill()
                process.wait()
        said = [Path(log.name).read_text() for log in logs]
        missing = [rank for rank, file in enumerate(files) if not file.exists()]
        told = "\n".join(f"--- process {rank} of {module}:\n{said[rank][-6000:]}" for rank in range(count))
        assert not missing, f"no result from {missing}, within {timeout} s or because another failed\n{told}"
        return [json.loads(file.read_text()) for file in files]


def write_result(path: str, result: object) -> None:
    """Write a result so that it is there whole or not at all."""
    whole = Path(path).with_suffix(".part")
    whole.write_text(json.dumps(result))
    whole.replace(path)
