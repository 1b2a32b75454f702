"""The building blocks of a report: a self-contained piece of HTML, plots embedded as SVG."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, ACCENT, GOOD, WARM = "#1c2733", "#6b7a89", "#2b6cb0", "#2f8f5b", "#c2703d"

MAX_COLUMN = 4
"""More boxes than this stand in two columns, by their titles alone."""
MAX_SPANS = 500
"""A text is shown as far as so many of its spans."""
MAX_SPAN = 700
"""Characters; of a longer span the middle is left out."""

STYLE = f"""<style>
.ts {{ font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: {INK};
  background: #fff; max-width: 60rem; margin: 0 auto; padding: 1.5rem; }}
.ts nav {{ font-size: .87rem; margin-bottom: -1.5rem; }}
.ts nav b {{ font-weight: 600; }}
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
.ts th, .ts td {{ text-align: right; padding: .3rem 1.4rem .3rem 0; border: 0;
  border-bottom: 1px solid #e8edf1; vertical-align: top; }}
.ts th {{ color: {MUTED}; font-weight: 500; font-size: .87rem; }}
.ts td, .ts th {{ white-space: nowrap; }}
.ts .words {{ white-space: normal; text-align: left; overflow-wrap: anywhere; }}
.ts .words:first-child {{ overflow-wrap: break-word; }}
.ts table.facts td:first-child {{ color: {MUTED}; white-space: nowrap; }}
.ts figure {{ margin: 0; }}
.ts figure img {{ width: 100%; height: auto; display: block; }}
.ts .text {{ white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.7 ui-monospace, Menlo, Consolas, monospace; background: #f7f9fb;
  border-radius: 6px; padding: .7rem .9rem; margin: .3rem 0 .9rem; max-height: 18rem;
  overflow-y: auto; }}
.ts .text.summary {{ max-height: none; }}
.ts .text.summary div {{ padding-left: 15ch; text-indent: -15ch; }}
.ts .sample {{ color: {MUTED}; font-size: .87rem; overflow-wrap: anywhere; }}
.ts mark {{ background: #d5efdf; color: inherit; border-radius: 3px; padding: .05em 0; }}
.ts .text q {{ quotes: none; color: {MUTED}; }}
.ts .flow {{ display: flex; flex-wrap: wrap; align-items: center; gap: .9rem; }}
.ts .box {{ border: 1px solid #cfd9e2; border-top: 3px solid {MUTED}; border-radius: 6px;
  padding: .5rem .9rem; }}
.ts .actors {{ display: grid; gap: .5rem; }}
.ts .actors.wide {{ grid-template-columns: repeat(2, 1fr); }}
.ts .actors.wide .box {{ padding: .15rem .7rem; }} .ts .actors.wide small {{ display: none; }}
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
.ts .shared {{ border-image: linear-gradient(90deg, {GOOD} 50%, {WARM} 50%) 1;
  border-width: 3px 0 0; background: #f7f9fb; }}
.ts .node.rest {{ color: {MUTED}; padding-top: .8rem; max-width: 17rem; }}
.ts .arrow {{ color: {MUTED}; font-size: 1.3rem; }}
@media (max-width: 50rem) {{ .ts .flow {{ flex-direction: column; align-items: start; }}
  .ts .arrow {{ rotate: 90deg; margin-left: 6rem; }} }}
.ts .bars div {{ display: flex; align-items: center; gap: .6rem; margin: .25rem 0; }}
.ts .bars span {{ width: 6rem; color: {MUTED}; }}
.ts .bars i {{ background: {ACCENT}; height: .9rem; border-radius: 2px; min-width: 2px; }}
</style>"""


def page(title: str, lead: str, *parts: str) -> str:
    """A report, as a deck shows it. ``parts`` are HTML."""
    head = f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
    return f'{STYLE}<div class="ts">{head}{"".join(parts)}</div>'


def document(title: str, body: str) -> str:
    """A report as a file of its own; ``navigation`` is put in where it says ``<nav></nav>``."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'</head><body style="margin:0"><div class="ts"><nav></nav></div>{body}</body></html>'
    )


def navigation(names: Iterable[str], current: str) -> str:
    """Links from a report's file to those beside it."""
    links = (
        f"<b>{name}</b>" if name == current else f'<a href="{name}.html">{name}</a>'
        for name in names
    )
    return f"<nav>{' · '.join(links)}</nav>"


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
    return table((), rows.items(), num_words=2, kind="facts")


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], num_words: int = 1, kind: str = ""
) -> str:
    """A table; the first ``num_words`` columns are text, the others are numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = (' class="words"' if i < num_words else "" for i in range(len(row)))
        texts = (f"<{tag}{k}>{escape(t)}</{tag}>" for k, t in zip(kinds, row, strict=True))
        return f"<tr>{''.join(texts)}</tr>"

    head = f"<thead>{cells('th', header)}</thead>" if header else ""
    body = "".join(cells("td", row) for row in rows)
    return f'<table class="{kind}">{head}<tbody>{body}</tbody></table>'


def highlighted(spans: Iterable[tuple[str, bool]]) -> str:
    """A text whose true spans are marked; what is too long to look at is left out."""
    spans = iter(spans)
    marked = [
        f"<mark>{escape(clipped(t))}</mark>" if on else f"<q>{escape(clipped(t))}</q>"
        for t, on in islice(spans, MAX_SPANS)
    ]
    left_out = sum(len(text) for text, _ in spans)
    rest = f"<q> [... {left_out:,} characters]</q>" if left_out else ""
    return f'<div class="text">{"".join(marked)}{rest}</div>'


def clipped(text: str, length: int = MAX_SPAN) -> str:
    """A text of ``length`` characters at most, but for a note of how many its middle had."""
    if len(text) <= length:
        return text
    half = length // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def sample_title(text: str) -> str:
    """What stands above a sample's text."""
    return f'<div class="sample">{escape(text)}</div>'


def amount(count: float) -> str:
    """A number that fits a tile: ``12,345``, ``8.1 M``, ``2.4 G``."""
    for unit, base in (("G", 1e9), ("M", 1e6)):
        if count >= base:
            return f"{count / base:,.1f} {unit}"
    return f"{count:,.0f}"


def size(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while num_bytes >= 1024 and power + 1 < len(units):
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:,.1f} {units[power]}" if power else f"{num_bytes:,.0f} bytes"


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


def rest_box(text: str) -> str:
    """Instead of more machines that look alike."""
    return f'<div class="node rest">{escape(text)}</div>'


def flow(*columns: Iterable[str], arrow: str = "→") -> str:
    """Boxes in columns, with arrows from one column to the next."""
    stacks = (f"<div>{''.join(boxes)}</div>" for boxes in columns)
    between = f'<div class="arrow">{arrow}</div>'
    return f'<div class="flow">{between.join(stacks)}</div>'


def lines(text: str) -> str:
    """Lines of a label and a text each; where they are too long they go on under their text."""
    divs = "".join(f"<div>{escape(line)}</div>" for line in text.splitlines())
    return f'<div class="text summary">{divs}</div>'


def bars(values: Mapping[str, tuple[float, str]]) -> str:
    """Horizontal bars by label, each with its value and that in words."""
    longest = max((value for value, _ in values.values()), default=0.0) or 1.0
    rows = (
        f'<div><span>{escape(label)}</span><i style="width:{30 * value / longest:.2f}rem"></i>'
        f"{escape(text)}</div>"
        for label, (value, text) in values.items()
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


def whole_numbers(axis: "Axis") -> None:
    """Label an axis at whole numbers only, a few of them."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter("{x:,.0f}")


def plot(figure: "Figure", description: str) -> str:
    """A figure as an image inside the page, with its description for whoever can't see it."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    svg: dict[Any, object] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "same",
        "font.family": "sans-serif",
    }
    with rc_context(svg):
        figure.savefig(buffer, format="svg", metadata={"Date": None})  # the same page every time
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(description)}</figcaption></figure>"
    )
