"""Where a comparison ran: the facts of a machine and its libraries that bits can depend on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from altgrad.libraries import installed_version

_LIBRARIES = ("numpy", "ml_dtypes", "jax", "jaxlib", "flax", "optax", "torch")
_INSTRUCTION_SETS = (
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "asimd",
)
_VARIABLES = (
    "XLA_FLAGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """What bits can depend on.

    Attributes:
        python: its version.
        system: operating system and architecture.
        processor: its name, as the system tells it.
        instruction_sets: those that libraries choose their kernels by, such as ``avx2`` and ``avx512f``.
        cores: how many this process may use.
        threads: how many each framework computes with, where it says so.
        versions: of the libraries that are installed.
        settings: environment variables that are set, and options of the frameworks that were imported.
    """

    python: str
    system: str
    processor: str
    instruction_sets: tuple[str, ...]
    cores: int
    threads: Mapping[str, int]
    versions: Mapping[str, str]
    settings: Mapping[str, str]

    @classmethod
    def here(cls) -> Environment:
        """This process's. Of a framework that was not imported the version is told, and nothing else.

        >>> here = Environment.here()
        >>> "numpy" in here.versions, here.cores >= 1
        (True, True)
        """
        about = _processor()
        versions = {name: installed_version(name) for name in _LIBRARIES}
        return cls(
            python=platform.python_version(),
            system=f"{platform.system()} {platform.machine()}",
            processor=about.get("model name", platform.processor() or "unknown"),
            instruction_sets=_instruction_sets(about.get("flags", about.get("Features", ""))),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=_threads(),
            versions={name: version for name, version in versions.items() if version is not None},
            settings={name: os.environ[name] for name in _VARIABLES if os.environ.get(name)} | _options(),
        )

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {**asdict(self), "instruction_sets": list(self.instruction_sets)}


def _processor() -> dict[str, str]:
    """What Linux tells of the first core; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _instruction_sets(flags: str) -> tuple[str, ...]:
    known = set(flags.split())
    return tuple(name for name in _INSTRUCTION_SETS if name in known)


def _threads() -> dict[str, int]:
    torch = sys.modules.get("torch")
    return {} if torch is None else {"torch": torch.get_num_threads()}


def _options() -> dict[str, str]:
    """Options that were set in code. JAX is not asked for its devices: that would start a backend."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    options: dict[str, str] = {}
    if jax is not None:
        options["jax_enable_x64"] = str(jax.config.jax_enable_x64)
        options["jax_default_matmul_precision"] = str(jax.config.jax_default_matmul_precision)
    if torch is not None:
        options["torch float32 matmul precision"] = torch.get_float32_matmul_precision()
        options["torch deterministic algorithms"] = str(torch.are_deterministic_algorithms_enabled())
        options["torch flush denormal"] = str(torch.tensor(2.0**-149).mul(1).item() == 0)
    return options
