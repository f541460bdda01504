"""A study as a page that opens offline and as Markdown: both are made from one view of the same numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import jinja2
from markupsafe import Markup

from altgrad.study.figures import PanelGroup, loss_group, rate_group, stress_group
from altgrad.study.results import Study
from altgrad.study.view import View, view_of

HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"

_TEMPLATES = Path(__file__).parent / "templates"
_MARKDOWN_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#~$"})
_PLOT_CONFIG = {"responsive": True, "displayModeBar": False, "showTips": False}


def write_report(study: Study, folder: str | Path) -> Path:
    """Write ``report.html``, one file that needs no network, and ``report.md``, its words and tables.

    Args:
        study: what to report on.
        folder: receives both files; made if needed.

    Returns:
        The path of ``report.html``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    view = view_of(study)
    page, markdown = folder / HTML_FILE, folder / MARKDOWN_FILE
    page.write_text(_html(view, study), encoding="utf-8")
    markdown.write_text(_markdown(view), encoding="utf-8")
    return page


def _html(view: View, study: Study) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = {"loss": loss_group(study), "stress": stress_group(study), "rates": rate_group(study)}
    plots = _plots(group for group in groups.values() if group is not None)
    return environment.get_template("report.html.j2").render(view=view, groups=groups, plots=plots)


def _plots(groups: Iterable[PanelGroup]) -> dict[str, Markup]:
    """Every panel as HTML; the first brings plotly's script for all."""
    panels = [panel for group in groups for panel in group.panels]
    return {
        panel.id: Markup(
            panel.figure.to_html(
                full_html=False,
                include_plotlyjs=index == 0,
                div_id=panel.id,
                config=_PLOT_CONFIG,
                default_height=f"{panel.figure.layout['height']}px",
            )
        )
        for index, panel in enumerate(panels)
    }


def _markdown(view: View) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=False,
        finalize=_escaped_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.md.j2").render(view=view)


def _escaped_markdown(value: object) -> object:
    """Make a text mean itself in Markdown, on one line."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return " ".join(value.translate(_MARKDOWN_SPECIAL).split())
