"""The figures of the report: curves with bands over seeds, faults and events marked on them.

One colour and dash for each format on the whole page (Okabe and Ito's palette, which colour-blind readers can tell
apart); names are escaped, since plotly reads a subset of HTML in its texts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from altgrad.study.analysis import (
    CLEAN,
    COMMITTED_NEAREST,
    COMMITTED_STOCHASTIC,
    REFERENCE,
    STRESS_OFF,
    STRESS_ON,
    VARIANTS,
    Variant,
    finite_steps,
    formats_of,
    runs_of,
    smoothed,
    smoothing_window,
    variants_of,
)
from altgrad.study.failures import fault_groups, lost_at
from altgrad.study.results import Study
from altgrad_core.events import Event

Curve = npt.NDArray[np.float64]

RATE_FLOOR = 1e-6
"""Where rates of zero are drawn on a logarithmic axis."""

_RATES = {
    "operand_underflow_rate": ("Operand underflow", "non-zero elements"),
    "underflow_rate": ("Gradient underflow", "non-zero elements"),
    "overflow_rate": ("Gradient overflow", "elements"),
    "worst_overflow_rate": ("Overflow at the worst site", "elements"),
    "stall_rate": ("Stall", "non-zero updates"),
}

_INK = "#333333"
_GRID = "#ececec"
_HEIGHT = 270
_LABEL_SPACE = 0.25


@dataclass(frozen=True)
class Style:
    """How a format is drawn.

    Attributes:
        color: CSS colour, six hexadecimal digits.
        dash: plotly's name of the dash.
    """

    color: str
    dash: str = "solid"


_STYLES: Mapping[str, Style] = MappingProxyType(
    {
        "float32": Style("#1a1a1a"),
        "bf16": Style("#8c8c8c", "dash"),  # it may lie on float32
        "E0M7": Style("#e69f00"),
        "E1M6": Style("#56b4e9", "dash"),  # it may lie exactly on E0M7
        "E3M4": Style("#009e73"),
        "E5M2": Style("#0072b2"),
        "E7M0": Style("#d55e00"),
    }
)
_MORE_STYLES = (
    Style("#cc79a7"),
    Style("#7a5195", "dash"),
    Style("#6b8e23"),
    Style("#a0522d", "dash"),
    Style("#2f8f9d", "dot"),
)


@dataclass(frozen=True)
class Mark:
    """How a kind of event is drawn, and what it is called in the key."""

    symbol: str
    glyph: str
    color: str
    label: str


MARKS: Mapping[str, Mark] = MappingProxyType(
    {
        "skip": Mark("x-thin", "×", "#555555", "step skipped"),
        "gate": Mark("diamond", "◆", "#0072b2", "gate open"),
        "shift": Mark("triangle-down", "▼", "#d55e00", "format shifted"),
        "rollback": Mark("triangle-left", "◀", "#9c4f7d", "rolled back"),
        "rounding": Mark("square", "■", "#009e73", "rounding changed"),
        "learning_rate": Mark("triangle-up", "▲", "#8a6d00", "learning rate changed"),
        "scales": Mark("hexagon", "⬢", "#56b4e9", "scales changed"),
        "exhausted": Mark("circle-open", "○", "#1a1a1a", "no format left to shift to"),
    }
)


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        id: of the element on the page.
        title: heading above it.
        description: what it shows, for those who cannot see it.
        figure: the plot.
    """

    id: str
    title: str
    description: str
    figure: go.Figure


@dataclass(frozen=True)
class PanelGroup:
    """Plots that are read together.

    Attributes:
        id: of the element on the page.
        caption: how to read them.
        panels: the plots.
        events: whether events are marked in them.
    """

    id: str
    caption: str
    panels: tuple[Panel, ...]
    events: bool = False


@dataclass(frozen=True)
class _Summary:
    """Curves of several seeds as one: their mean and range over the seeds that are finite at a step."""

    mean: Curve
    low: Curve
    high: Curve

    @classmethod
    def of(cls, curves: Sequence[Curve]) -> _Summary:
        stacked = np.stack(curves)
        finite = np.isfinite(stacked)
        count = finite.sum(0)
        total = np.where(finite, stacked, 0).sum(0)
        mean = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
        low = np.where(count > 0, np.where(finite, stacked, np.inf).min(0), np.nan)
        high = np.where(count > 0, np.where(finite, stacked, -np.inf).max(0), np.nan)
        return cls(mean, low, high)


def style_of(study: Study, name: str) -> Style:
    """How a format is drawn."""
    if name in _STYLES:
        return _STYLES[name]
    others = [each for each in formats_of(study) if each not in _STYLES]
    return _MORE_STYLES[others.index(name) % len(_MORE_STYLES)]


def reading_note(study: Study) -> str:
    """How to read all figures."""
    window = smoothing_window(study)
    smooth = f"; curves are lightly smoothed (running median, then mean, over {window} steps)" if window > 1 else ""
    return (
        "Lines are means over the seeds that are still finite, and bands run from the lowest to the highest of them"
        f"{smooth}. A thin × ends a run that never was finite again."
    )


def loss_group(study: Study) -> PanelGroup | None:
    """Training loss in the scenes without faults, and its distance to float32."""
    variants = [
        variant for variant in (CLEAN, COMMITTED_NEAREST, COMMITTED_STOCHASTIC) if variant in variants_of(study)
    ]
    if not variants:
        return None
    limits = _loss_range(study, variants)
    losses = [_loss_panel(study, variant, limits) for variant in variants]
    gaps = [_gap_panel(study, variant) for variant in variants] if runs_of(study, CLEAN, REFERENCE) else []
    caption = "Training loss, the axis cut at both ends and the same in all panels."
    if gaps:
        caption += (
            " Below it the distance to undisturbed float32 of the same seed at the same step: what the batches have in "
            "common cancels, and differences show that the curves above hide."
        )
    return PanelGroup("loss", caption, (*losses, *gaps))


def stress_group(study: Study) -> PanelGroup | None:
    """Training loss under stress, without and with interventions, and when what acted."""
    variants = [variant for variant in (STRESS_OFF, STRESS_ON) if variant in variants_of(study)]
    if not variants:
        return None
    limits = _loss_range(study, variants)
    panels = [_loss_panel(study, variant, limits) for variant in variants]
    if STRESS_ON in variants:
        panels.append(_timeline(study))
    caption = (
        "Training loss while faults hit (grey, labelled). What acted is shown seed by seed, each a row of marks within "
        "its format’s band, at the step that was the reason; the decision lands one step later."
    )
    return PanelGroup("stress", caption, tuple(panels), events=True)


def rate_group(study: Study) -> PanelGroup | None:
    """Overflow, underflow and stall over time."""
    wanted = (
        (CLEAN, "operand_underflow_rate"),
        (CLEAN, "underflow_rate"),
        (CLEAN, "overflow_rate"),
        (STRESS_ON, "overflow_rate"),
        (STRESS_ON, "worst_overflow_rate"),
        (STRESS_ON, "underflow_rate"),
        (STRESS_ON, "stall_rate"),
        (COMMITTED_NEAREST, "stall_rate"),
        (COMMITTED_STOCHASTIC, "stall_rate"),
    )
    panels = [_rate_panel(study, *each) for each in wanted if each[0] in variants_of(study)]
    if not panels:
        return None
    caption = (
        "Underflow: non-zero elements that become zero. Stall: non-zero updates that leave the quantised weight as it "
        "was. Overflow is neither smoothed nor averaged: the largest rate of any seed around a step is drawn, on a "
        "logarithmic axis with zero at its foot."
    )
    if _gate(study) is not None:
        caption += " The dashed line is where the clipper’s gate opens."
    return PanelGroup("rates", caption, tuple(panels), events=STRESS_ON in variants_of(study))


def _loss_range(study: Study, variants: Sequence[Variant]) -> tuple[float, float]:
    """From below the lowest smoothed loss of some variants to above the highest that a run ends at."""
    window = smoothing_window(study)
    rows = [row for row, run in enumerate(study.runs) if Variant.of(run) in variants]
    curves = [smoothed(loss, window) for loss in study.series["loss"][rows]]
    kept = [curve[np.isfinite(curve)] for curve in curves]
    kept = [curve for curve in kept if len(curve)]
    if not kept:
        return 0.0, 1.0
    low = min(float(curve.min()) for curve in kept)
    end = max((float(curve[-1]) for curve in curves if np.isfinite(curve[-1])), default=low)
    return low - 0.05, max(end + 0.25, low + 1.0)


def _loss_panel(study: Study, variant: Variant, limits: tuple[float, float]) -> Panel:
    figure = _figure(study, "training loss [nats/char]", limits)
    for name in formats_of(study):
        curves = _curves(study, "loss", variant, name, smooth=True)
        _draw(figure, study, name, curves, "%{y:.3f} nats/char")
    _mark_faults(figure, study, variant)
    return Panel(
        id=f"loss-{_slug(variant)}",
        title=_titles(variant),
        description=f"Training loss over steps, one line for each format: {variant.label}.",
        figure=figure,
    )


def _gap_panel(study: Study, variant: Variant) -> Panel:
    figure = _figure(study, "loss − float32 [nats/char]", None)
    figure.add_hline(y=0, line={"color": _INK, "width": 1})
    control = runs_of(study, CLEAN, REFERENCE)
    window = smoothing_window(study)
    for name in formats_of(study):
        rows = {seed: row for seed, row in runs_of(study, variant, name).items() if seed in control}
        loss = study.series["loss"].astype(np.float64)
        gaps = {row: smoothed(loss[row] - loss[control[seed]], window) for seed, row in rows.items()}
        if name != REFERENCE:
            _draw(figure, study, name, gaps, "%{y:+.3f} nats/char to float32")
    return Panel(
        id=f"gap-{_slug(variant)}",
        title=f"{variant.label[0].upper()}{variant.label[1:]}: distance to float32",
        description=f"Training loss minus that of float32 of the same seed, over steps: {variant.label}.",
        figure=figure,
    )


def _rate_panel(study: Study, variant: Variant, series: str) -> Panel:
    title, whole = _RATES[series]
    logarithmic = "overflow" in series
    figure = _figure(study, f"share of {whole}", None)
    for name in formats_of(study):
        curves = _curves(study, series, variant, name, smooth=not logarithmic)
        if logarithmic:
            curves = {row: _envelope(study, curve) for row, curve in curves.items()}
        _draw(figure, study, name, curves, "%{y:.2%}", highest=logarithmic, events=variant == STRESS_ON)
    _mark_faults(figure, study, variant)
    if logarithmic:
        powers = range(-6, 1)
        labels = ["0", *(f"{10.0 ** (power + 2):g}%" for power in powers[1:])]
        figure.update_yaxes(
            type="log", range=[-6.15, 0.15], tickvals=[10.0**power for power in powers], ticktext=labels
        )
        gate = _gate(study)
        if gate is not None:
            figure.add_hline(y=gate, line={"color": "#777777", "width": 1, "dash": "dash"})
    else:
        figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return Panel(
        id=f"{series.replace('_', '-')}-{_slug(variant)}",
        title=f"{title}: {variant.label}",
        description=f"{title}, share of {whole}, over steps, one line for each format: {variant.label}.",
        figure=figure,
    )


def _gate(study: Study) -> float | None:
    """The overflow rate that opens the clipper's gate, if the study tells."""
    gate = study.config.get("overflow_threshold")
    return float(gate) if isinstance(gate, (int, float)) and gate > 0 else None


def _timeline(study: Study) -> Panel:
    names = [name for name in formats_of(study) if runs_of(study, STRESS_ON, name)]
    figure = _figure(study, "", None)
    for kind, mark in MARKS.items():
        x, y, text = [], [], []
        for lane, name in enumerate(names):
            rows = runs_of(study, STRESS_ON, name)
            for place, (seed, row) in enumerate(sorted(rows.items())):
                for event in (event for event in study.runs[row].events if event.kind == kind):
                    x.append(event.step)
                    y.append(lane + 0.5 * ((place + 0.5) / len(rows) - 0.5))
                    text.append(html.escape(f"{name}, seed {seed}, step {event.step}: {_event_text(event)}"))
        if x:
            figure.add_scatter(
                x=x,
                y=y,
                text=text,
                mode="markers",
                marker=_marker(mark, mark.color),
                hovertemplate="%{text}<extra></extra>",
            )
    labels = [html.escape(name) for name in names]
    lanes = list(range(len(names)))
    figure.update_yaxes(tickvals=lanes, ticktext=labels, range=[len(names) - 0.4, -0.6], tickfont={"size": 12})
    figure.update_xaxes(range=[-0.02 * study.steps, 1.02 * study.steps])
    figure.update_layout(height=70 + 28 * max(len(names), 1))
    _mark_faults(figure, study, STRESS_ON)
    return Panel(
        id="timeline",
        title="Stress, interventions on: what acted, and when",
        description="Events of all runs under stress with interventions, one row for each format, over steps.",
        figure=figure,
    )


def _event_text(event: Event) -> str:
    numbers = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in event.numbers.items()
    )
    return f"{event.kind} ({event.cause}{'; ' + numbers if numbers else ''})"


def _curves(study: Study, series: str, variant: Variant, name: str, *, smooth: bool) -> dict[int, Curve]:
    """One curve for each run, by row, with gaps where its step was not finite."""
    window = smoothing_window(study) if smooth else 1
    rows = runs_of(study, variant, name).values()
    return {
        row: smoothed(np.where(finite_steps(study, row), study.series[series][row], np.nan), window) for row in rows
    }


def _envelope(study: Study, curve: Curve) -> Curve:
    """The largest value around each step, so that rare overflows stay visible; at least the foot of the axis."""
    half = smoothing_window(study) // 2
    padded = np.pad(np.nan_to_num(curve), half)
    largest = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1).max(axis=1)
    return np.where(np.isfinite(curve), np.maximum(largest, RATE_FLOOR), np.nan)


def _draw(
    figure: go.Figure,
    study: Study,
    name: str,
    curves: Mapping[int, Curve],
    number: str,
    *,
    highest: bool = False,
    events: bool = False,
) -> None:
    """Add a format's band and mean, or only the highest seed, to a figure, with ends and events."""
    if not curves:
        return
    style, summary = style_of(study, name), _Summary.of(list(curves.values()))
    line = summary.high if highest else summary.mean
    steps = np.arange(study.steps, dtype=np.int32)
    shared = {"legendgroup": name, "showlegend": False}
    if len(curves) > 1 and not highest:
        x, y = _outline(steps, summary)
        figure.add_scatter(
            x=x,
            y=y,
            fill="toself",
            fillcolor=_faded(style.color),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            **shared,
        )
    figure.add_scatter(
        x=steps,
        y=line.astype(np.float32),
        mode="lines" if study.steps > 1 else "markers",
        line={"color": style.color, "width": 1.7, "dash": style.dash},
        marker={"color": style.color},
        name=html.escape(name),
        hovertemplate=f"<b>{html.escape(name)}</b> step %{{x}}: {number}<extra></extra>",
        **shared,
    )
    ends = [(step - 1, line[step - 1]) for row in curves if (step := lost_at(study, row))]
    if ends:
        x, y = zip(*sorted(set(ends)), strict=True)
        marker = {"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": style.color}}
        figure.add_scatter(
            x=x,
            y=y,
            mode="markers",
            marker=marker,
            hovertemplate=f"{html.escape(name)} lost after step %{{x}}<extra></extra>",
            **shared,
        )
    if events:
        _mark_events(figure, study, name, curves, line, style, shared)


def _mark_events(
    figure: go.Figure,
    study: Study,
    name: str,
    curves: Iterable[int],
    line: Curve,
    style: Style,
    shared: Mapping[str, object],
) -> None:
    """Mark events on a format's curve, at its last finite value; of several in a row the first."""
    logged = [event for row in curves for event in study.runs[row].events]
    for kind, mark in MARKS.items():
        steps = {event.step for event in logged if event.kind == kind and event.step < study.steps}
        placed = [(step, _last_finite(line, step)) for step in sorted(steps) if step - 1 not in steps]
        if placed:
            x, y = zip(*placed, strict=True)
            figure.add_scatter(
                x=x,
                y=y,
                mode="markers",
                marker=_marker(mark, style.color),
                hovertemplate=f"{html.escape(name)} step %{{x}}: {mark.label}<extra></extra>",
                **shared,
            )


def _last_finite(values: Curve, step: int) -> float:
    before = values[: step + 1]
    finite = before[np.isfinite(before)]
    return float(finite[-1]) if len(finite) else np.nan


def _mark_faults(figure: go.Figure, study: Study, variant: Variant) -> None:
    """Grey lines, or bars for several steps in a row, where faults were injected; each labelled once."""
    groups = {
        (group[0].step, group[-1].step, group[0].cause): group
        for run in study.runs
        if Variant.of(run) == variant
        for group in fault_groups(run.events)
    }
    raised, previous = False, -math.inf
    for key in sorted(groups):
        raised = not raised and key[0] - previous < _LABEL_SPACE * study.steps
        previous = key[0]
        _mark_fault(figure, groups[key], raised)
    if groups:
        figure.update_layout(margin={"t": 34})


def _mark_fault(figure: go.Figure, group: Sequence[Event], raised: bool) -> None:
    first, last = group[0], group[-1]
    value = first.numbers.get("value")
    label = {
        "nan": f"{len(group)} NaN" if len(group) > 1 else "NaN",
        "spike": "spike" if value is None else f"loss × {_short(float(value))}",
        "weight": "weight" if value is None else f"weight {_short(float(value))}",
    }.get(first.cause, html.escape(first.cause))
    figure.add_vrect(
        x0=first.step - 0.4, x1=last.step + 0.4, fillcolor="#999999", opacity=0.35, line_width=0, layer="below"
    )
    figure.add_annotation(
        x=first.step,
        y=1,
        yref="paper",
        text=label,
        showarrow=False,
        xanchor="left",
        yanchor="bottom",
        yshift=14 if raised else 0,
        font={"size": 11, "color": "#666666"},
    )


def _short(value: float) -> str:
    """A number for a label in a plot; powers of ten as such."""
    exponent = round(math.log10(value)) if math.isfinite(value) and value > 0 else 0
    return f"10<sup>{exponent}</sup>" if exponent > 2 and value == 10.0**exponent else f"{value:g}"


def _outline(steps: npt.NDArray[np.int32], summary: _Summary) -> tuple[list[float | None], list[float | None]]:
    """The band as closed polygons, one for each stretch of finite steps, with gaps between them."""
    x: list[float | None] = []
    y: list[float | None] = []
    finite = np.flatnonzero(np.isfinite(summary.mean))
    for stretch in np.split(finite, np.flatnonzero(np.diff(finite) > 1) + 1):
        if len(stretch) > 1:
            x += [*steps[stretch].tolist(), *steps[stretch][::-1].tolist(), None]
            y += [*np.round(summary.high[stretch], 5).tolist(), *np.round(summary.low[stretch][::-1], 5).tolist(), None]
    return x, y


def _figure(study: Study, y_title: str, limits: tuple[float, float] | None) -> go.Figure:
    axis = {
        "gridcolor": _GRID,
        "zeroline": False,
        "linecolor": "#bbbbbb",
        "ticks": "outside",
        "tickcolor": "#bbbbbb",
        "automargin": True,
    }
    figure = go.Figure()
    figure.update_layout(
        template=go.layout.Template(),
        height=_HEIGHT,
        margin={"l": 50, "r": 10, "t": 8, "b": 40},
        font={"family": "system-ui, sans-serif", "size": 12, "color": _INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
        # The same steps in every panel, also where all runs are lost halfway.
        xaxis={**axis, "title": {"text": "step", "standoff": 6}, "range": [0, max(study.steps - 1, 1)]},
        yaxis={**axis, "title": {"text": y_title, "standoff": 6}, "range": limits},
        showlegend=False,
    )
    return figure


def _marker(mark: Mark, color: str) -> dict[str, object]:
    thin = mark.symbol.endswith(("-thin", "-open"))
    return {
        "symbol": mark.symbol,
        "size": 6 if mark.symbol == "x-thin" else 8,
        "color": color,
        "line": {"width": 1.5 if thin else 0.5, "color": color if thin else "#ffffff"},
    }


def _faded(color: str) -> str:
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _titles(variant: Variant) -> str:
    return {
        CLEAN: "Clean: float32 master weights",
        COMMITTED_NEAREST: "Committed: stored on the grid, nearest",
        COMMITTED_STOCHASTIC: "Committed: stored on the grid, stochastic",
        STRESS_OFF: "Stress, interventions off",
        STRESS_ON: "Stress, interventions on",
    }[variant]


def _slug(variant: Variant) -> str:
    return f"variant{VARIANTS.index(variant)}"
