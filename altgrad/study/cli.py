"""``altgrad study`` and ``altgrad report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from altgrad.study.results import Study, load, save
from altgrad.study.runner import StudyConfig as StudyConfig
from altgrad.study.runner import entries, run_study
from altgrad_jax.job import StepReport


@dataclass(frozen=True)
class ReportConfig:
    """Write the report of a study again, from what it saved."""

    folder: Path = Path("altgrad-study")
    """Folder of the study: study.json and series.npz."""


def study(config: StudyConfig, console: Console | None = None) -> Path:
    """Run ``altgrad study``: train, save, report.

    Returns:
        The report's path, which is also the last line printed.
    """
    import altgrad.study.report  # noqa: F401  # what the report needs should be missed before the training, not after

    console = console or Console(stderr=True)
    runs = len(entries(config))
    console.print(f"{runs} runs of {config.steps} steps: {len(config.formats)} formats, {config.seeds} seeds")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("run-steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=runs * config.steps)
        reached: dict[str, int] = {}

        def on_step(name: str, size: int, report: StepReport) -> None:
            reached[name] = report.step + 1
            steps = ", ".join(f"{fleet} {step}" for fleet, step in sorted(reached.items()))
            progress.update(task, advance=size, description=f"steps: {steps}")

        result = run_study(config, on_step)
    save(result, config.out)
    return _announce(_write_report(result, config.out), console)


def report(config: ReportConfig, console: Console | None = None) -> Path:
    """Run ``altgrad report``: write the report of a saved study again.

    Returns:
        The report's path, which is also the last line printed.
    """
    return _announce(_write_report(load(config.folder), config.folder), console or Console(stderr=True))


def _write_report(result: Study, folder: Path) -> Path:
    from altgrad.study.report import write_report  # late: training needs neither plotly nor jinja2

    return write_report(result, folder)


def _announce(path: Path, console: Console) -> Path:
    console.print(f"report: {path.resolve()}", soft_wrap=True, highlight=False)
    return path
