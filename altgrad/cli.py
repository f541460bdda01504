"""The ``altgrad`` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from altgrad_core.errors import InputError

_INTERRUPTED = 130
_MOST_DEVICES = 16
_TRAIN, _REPORT = "train", "report"
_EXTRAS = dict.fromkeys(("tyro", "flax", "orbax", "rich", "jax", "optax"), _TRAIN) | dict.fromkeys(
    ("plotly", "jinja2", "scipy"), _REPORT
)


def main() -> None:
    """Parse the command line and run what it asks for; user errors are one line, without a traceback."""
    _share_out_the_cores()
    try:
        _run()
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRAS:
            raise
        sys.exit(f"altgrad: {package} is not installed; this command needs the extra altgrad[{_EXTRAS[package]}]")
    except (InputError, OSError) as error:
        sys.exit(f"altgrad: {error}")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _run() -> None:
    import tyro

    from altgrad.study.cli import ReportConfig, StudyConfig, report, study
    from altgrad.train import TrainConfig, train

    config = tyro.cli(
        Annotated[TrainConfig, tyro.conf.subcommand("train")]
        | Annotated[StudyConfig, tyro.conf.subcommand("study")]
        | Annotated[ReportConfig, tyro.conf.subcommand("report")],
        prog="altgrad",
        description="Train in any 8-bit floating-point format, and see why a format fails.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if isinstance(config, TrainConfig):
        if train(config) is None:
            sys.exit(_INTERRUPTED)
    elif isinstance(config, StudyConfig):
        study(config)
    else:
        report(config)


def _share_out_the_cores() -> None:
    """Make a CPU look like one device per core, so that a fleet's runs go side by side. Before jax is imported."""
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={min(usable, _MOST_DEVICES)}".strip()
