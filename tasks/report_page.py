"""The building blocks of a report: a self-contained piece of HTML, plots embedded as SVG."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, ACCENT, GOOD, WARM = "#1c2733", "#6b7a89", "#2b6cb0", "#2f8f5b", "#c2703d"

MAX_COLUMN = 4
"""More boxes than this stand in two columns."""

STYLE = f"""<style>
.ts {{ font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: {INK};
  background: #fff; max-width: 60rem; margin: 0 auto; padding: 1.5rem; }}
.ts nav {{ font-size: .87rem; margin-bottom: -1.5rem; }}
.ts a {{ color: {ACCENT}; text-decoration: none; }}
.ts h1 {{ font-size: 1.5rem; font-weight: 600; margin: 0; }}
.ts h2 {{ font-size: 1.05rem; font-weight: 600; margin: 2.2rem 0 .7rem; }}
.ts .lead, .ts figcaption, .ts .note {{ color: {MUTED}; }}
.ts .lead {{ margin: .2rem 0 1.4rem; }}
.ts .note, .ts figcaption {{ font-size: .87rem; margin: .4rem 0; }}
.ts .tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr));
  gap: .7rem; }}
.ts .tile {{ border: 1px solid #e2e8ee; border-radius: 6px; padding: .6rem .9rem; }}
.ts .tile b {{ display: block; font-size: 1.35rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }}
.ts .tile span {{ color: {MUTED}; font-size: .85rem; }}
.ts table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
.ts th, .ts td {{ text-align: right; padding: .3rem .9rem .3rem 0; border: 0;
  border-bottom: 1px solid #e8edf1; }}
.ts th:first-child, .ts td:first-child {{ text-align: left; }}
.ts th {{ color: {MUTED}; font-weight: 500; font-size: .87rem; }}
.ts table.facts td {{ text-align: left; }}
.ts table.facts td:first-child {{ color: {MUTED}; white-space: nowrap; vertical-align: top; }}
.ts figure {{ margin: 0; }}
.ts figure img {{ width: 100%; height: auto; display: block; }}
.ts .text {{ white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.7 ui-monospace, Menlo, Consolas, monospace; background: #f7f9fb;
  border-radius: 6px; padding: .7rem .9rem; margin: .5rem 0; }}
.ts mark {{ background: #d5efdf; color: inherit; border-radius: 3px; padding: .05em 0; }}
.ts .text q {{ quotes: none; color: {MUTED}; }}
.ts .flow {{ display: flex; flex-wrap: wrap; align-items: center; gap: .9rem; }}
.ts .box {{ border: 1px solid #cfd9e2; border-top: 3px solid {MUTED}; border-radius: 6px;
  padding: .5rem .9rem; }}
.ts .actors {{ display: grid; gap: .5rem; }}
.ts .actors.wide {{ grid-template-columns: repeat(2, 1fr); }}
.ts .box b {{ font-weight: 600; display: block; }}
.ts .box small {{ color: {MUTED}; }}
.ts .node {{ border: 1px dashed #b8c4cf; border-radius: 8px; padding: .4rem .8rem .8rem; }}
.ts .node + .node {{ margin-top: .7rem; }}
.ts .node > small {{ color: {MUTED}; display: block; margin-bottom: .3rem; }}
.ts .decision {{ display: flex; gap: .8rem; align-items: baseline; border-radius: 6px;
  padding: .7rem 1rem; margin-bottom: 1rem; background: #eef7f1; }}
.ts .decision b {{ color: {GOOD}; font-size: 1.2rem; }}
.ts .decision.bad {{ background: #fbf1ea; }} .ts .decision.bad b {{ color: {WARM}; }}
.ts .engine {{ border-top-color: {WARM}; }} .ts .store {{ border-top-color: {ACCENT}; }}
.ts .trainer {{ border-top-color: {GOOD}; }}
.ts .arrow {{ color: {MUTED}; font-size: 1.3rem; }}
.ts .bars div {{ display: flex; align-items: center; gap: .6rem; margin: .25rem 0; }}
.ts .bars span {{ width: 6rem; color: {MUTED}; }}
.ts .bars i {{ background: {ACCENT}; height: .9rem; border-radius: 2px; min-width: 2px; }}
</style>"""


def page(title: str, lead: str, *parts: str) -> str:
    """A report, as a deck shows it. ``parts`` are HTML."""
    head = f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
    return f'{STYLE}<div class="ts">{head}{"".join(parts)}</div>'


def document(title: str, body: str, links: Iterable[str]) -> str:
    """A report as a file of its own, with ``links`` to the files beside it."""
    others = " · ".join(f'<a href="{name}.html">{name}</a>' for name in links)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'</head><body style="margin:0"><div class="ts"><nav>{others}</nav></div>{body}'
        "</body></html>"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what belongs under it."""
    return f"<h2>{escape(title)}</h2>{''.join(parts)}"


def note(text: str) -> str:
    """An explanation in small type."""
    return f'<p class="note">{escape(text)}</p>'


def tiles(figures: Mapping[str, str]) -> str:
    """The figures that matter most, by label."""
    cells = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for label, value in figures.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def facts(rows: Mapping[str, str]) -> str:
    """Names and values."""
    cells = (
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows.items()
    )
    return f'<table class="facts">{"".join(cells)}</table>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = (f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def highlighted(spans: Iterable[tuple[str, bool]]) -> str:
    """A text whose true spans are marked."""
    marked = (f"<mark>{escape(t)}</mark>" if on else f"<q>{escape(t)}</q>" for t, on in spans)
    return f'<div class="text">{"".join(marked)}</div>'


def box(kind: str, title: str, text: str) -> str:
    """A part of the system; ``kind`` is ``engine``, ``store`` or ``trainer``."""
    return f'<div class="box {kind}"><b>{escape(title)}</b><small>{escape(text)}</small></div>'


def node_box(title: str, boxes: Iterable[str]) -> str:
    """A machine with what runs on it."""
    actors = list(boxes)
    wide = " wide" if len(actors) > MAX_COLUMN else ""
    inside = f'<div class="actors{wide}">{"".join(actors)}</div>'
    return f'<div class="node"><small>{escape(title)}</small>{inside}</div>'


def decision(is_good: bool, text: str) -> str:
    """How something was decided, at a glance."""
    kind, sign = ("good", "&#10003;") if is_good else ("bad", "!")
    return f'<div class="decision {kind}"><b>{sign}</b><span>{escape(text)}</span></div>'


def flow(*columns: Iterable[str]) -> str:
    """Boxes in columns, with arrows from one column to the next."""
    arrow = '<div class="arrow">&rarr;</div>'
    stacks = (f"<div>{''.join(boxes)}</div>" for boxes in columns)
    return f'<div class="flow">{arrow.join(stacks)}</div>'


def lines(text: str) -> str:
    """A text laid out in lines of its own."""
    return f'<div class="text">{escape(text)}</div>'


def bars(values: Mapping[str, float], unit: str) -> str:
    """Horizontal bars, in the order given."""
    longest = max(values.values(), default=0.0) or 1.0
    rows = (
        f'<div><span>{escape(label)}</span><i style="width:{30 * value / longest:.2f}rem"></i>'
        f"{value:.1f} {escape(unit)}</div>"
        for label, value in values.items()
    )
    return f'<div class="bars">{"".join(rows)}</div>'


def axes(titles: Sequence[str], height: float) -> "tuple[Figure, list[Axes]]":
    """Plain axes side by side over the page's width; ``height`` in inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    quiet: dict[Any, object] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#b8c4cf",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.labelcolor": MUTED,
        "grid.color": "#e8edf1",
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
    with rc_context(quiet):
        figure = Figure(figsize=(9.2, height), layout="constrained")
        row = list(figure.subplots(1, len(titles), squeeze=False).flat)
        for ax, title in zip(row, titles, strict=True):
            ax.set_title(title)
    return figure, row


def plot(figure: "Figure", description: str) -> str:
    """A figure as an image inside the page, with its description for whoever can't see it."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(description)}</figcaption></figure>"
    )
