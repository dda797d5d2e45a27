"""The web page of data_report.py: page.html, the charts in it, drawn by matplotlib as SVG, and the sunburst as a PNG.

Text and axes of the charts take the colour of the page's text, and the bars have colours that stand out on white and on
black, so that one drawing serves light and dark.
"""

import colorsys
import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from alpaca.report.verb_noun import INSTALL

INK = "#010203"  # stands for the colour of the page's text until the SVG is in the page
GREY = "#767676"  # legible on white and on black: text of the PNG, whose surroundings are unknown
COLORS = ("#3f86c9", "#d9772b")  # the first data set, the second
SHOWN = 12  # rows or pairs that the page lists of each finding; report.json has more
EXCERPT = 160  # characters of a text that a list shows
POINTS_PER_RADIUS = 310  # points from the centre of the sunburst to its edge
SMALLEST_TEXT = 4.5  # points; the table beneath the sunburst names what is too narrow for text


def build(reports: Sequence[dict], data_sets: Sequence[Sequence[dict]], settings: dict[str, Any]) -> str:
    """The whole page. `reports` are the data sets of report.json, `data_sets` their examples, for the excerpts."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    charts = (length_charts, padding_charts, score_charts, sunbursts)
    return template.render(
        reports=reports,
        data=list(zip(reports, data_sets, strict=True)),
        settings=settings,
        shown=SHOWN,
        install=INSTALL,
        **{function.__name__: function for function in (look_up, percent, excerpt)},
        **{function.__name__: functools.partial(function, reports) for function in charts},
    )


def look_up(report: dict, path: str) -> Any:
    """look_up(report, "outputs.empty.count"); None where there is no such figure."""
    for key in path.split("."):
        report = (report or {}).get(key)
    return report


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def excerpt(text: str, end: bool = False) -> str:
    text = " ".join(text.split())
    if len(text) <= EXCERPT:
        return text
    return "…" + text[-EXCERPT:] if end else text[:EXCERPT] + "…"


def length_charts(reports: Sequence[dict], field: str, unit: str) -> str:
    def draw(ax: Any, report: dict, color: str) -> str:
        lengths = report["lengths"][f"{field}_{unit}"]
        _bars(ax, lengths, color)
        label = f"{unit} in the {field}"
        if lengths["rows"]:
            label += f"\nmean {lengths['mean']:g}, median {lengths['median']:g}, longest {lengths['max']:,}"
        if field == "example":
            limit, starts = report["tokens"]["model_max_length"], lengths["bin_starts"]
            label += f"; cut at {limit}: {percent(report['tokens']['rows_cut'], lengths['rows'])} of rows"
            if limit <= starts[-1] + starts[1]:
                ax.axvline(limit, color=INK, linestyle="--", linewidth=1)
        ax.set_xlabel(label)
        return f"{field.capitalize()}: {report['name']}, {lengths['rows']:,} rows"

    return _bar_charts(reports, f"Histogram of {field} lengths in {unit}", "% of rows", draw)


def padding_charts(reports: Sequence[dict]) -> str:
    def draw(ax: Any, report: dict, color: str) -> str:
        shares = {size: 100 * share for size, share in report["tokens"]["padding_share"].items()}
        ax.bar_label(ax.bar(shares.keys(), shares.values(), color=color), fmt="%.0f %%", fontsize=9)
        ax.set_xlabel("examples in a batch, random order")
        return f"Padding: {report['name']}, {report['rows']:,} rows"

    return _bar_charts(reports, "Share of padding by batch size", "% of token positions", draw)


def score_charts(reports: Sequence[dict], path: str, title: str, unit: str) -> str:
    """Histograms of the "scores" at this path of each report; nothing where there is no score at all."""
    if not any(look_up(report, path)["scores"]["rows"] for report in reports):
        return ""

    def draw(ax: Any, report: dict, color: str) -> str:
        scores = look_up(report, path)["scores"]
        _bars(ax, scores, color)
        ax.set_xlim(scores["bin_starts"][0], 1)
        of = f", of {report['rows']:,} rows" if unit != "rows" else ""
        ax.set_xlabel(f"ROUGE-L F\n{scores['rows']:,} {unit}{of}")
        return f"{title}: {report['name']}"

    return _bar_charts(reports, f"{title}: histogram of similarities", f"% of {unit}", draw)


def sunbursts(reports: Sequence[dict]) -> str:
    return _svg("Sunburst of root verbs and their direct objects", functools.partial(_sunburst, reports))


def sunburst_png(report: dict, file: io.IOBase) -> None:
    """The sunburst of one data set on a transparent ground."""
    with matplotlib.rc_context(_style(GREY)):
        figure = _sunburst([report])
        figure.savefig(file, format="png", dpi=110, transparent=True, metadata={"Software": None}, bbox_inches="tight")


def _bar_charts(reports: Sequence[dict], description: str, y: str, draw: Callable[[Any, dict, str], str]) -> str:
    """A chart a data set, side by side on the same scales; `draw(axes, report, color)` returns its title."""

    def draw_all() -> Figure:
        figure = Figure(figsize=(5.6 * len(reports), 2.9), layout="constrained")
        charts = figure.subplots(1, len(reports), sharex=True, sharey=True, squeeze=False)[0]
        for ax, report, color in zip(charts, reports, COLORS, strict=False):
            ax.set_title(draw(ax, report, color))
            ax.set_ylabel(y)
            ax.yaxis.set_tick_params(labelleft=True)
        return figure

    return _svg(description, draw_all)


def _bars(ax: Any, histogram: dict, color: str) -> None:
    starts, rows = histogram["bin_starts"], max(histogram["rows"], 1)
    width = 0.9 * (starts[1] - starts[0])
    ax.bar(starts, [100 * count / rows for count in histogram["counts"]], width, align="edge", color=color)


def _sunburst(reports: Sequence[dict]) -> Figure:
    figure = Figure(figsize=(9 * len(reports), 9.4), layout="constrained")
    for ax, report in zip(figure.subplots(1, len(reports), squeeze=False)[0], reports, strict=True):
        verbs, objects = [], []  # slices: text, rows, colour; an inner slice is as wide as the outer ones together
        for number, verb in enumerate(report["root_verbs"]["top"]):
            hue = number * 0.381966 % 1  # golden ratio: neighbours differ
            verbs.append((verb["verb"], sum(rows for _, rows in verb["objects"]), colorsys.hls_to_rgb(hue, 0.40, 0.55)))
            objects += [
                (noun, rows, colorsys.hls_to_rgb(hue, 0.80 - 0.03 * (position % 2), 0.55))
                for position, (noun, rows) in enumerate(verb["objects"])
            ]
        shown = sum(rows for _, rows, _ in verbs)
        title = f"Root verbs and their objects: {report['name']}\n{shown:,} of {report['rows']:,} rows"
        ax.set_title(title, fontsize=14, loc="center")
        if verbs:
            _ring(ax, verbs, 0.24, 0.58, "white", 10)
            _ring(ax, objects, 0.585, 1.0, "#101010", 8.5)
        ax.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02))
        ax.axis("off")
    return figure


def _ring(ax: Any, slices: Iterable[tuple], inner: float, outer: float, ink: str, size: float) -> None:
    """A ring of slices, clockwise from the top, each with its text along the radius where it fits."""
    texts, rows, colors = zip(*slices, strict=True)
    middle = (inner + outer) / 2
    wedges, labels = ax.pie(
        rows,
        radius=outer,
        colors=colors,
        labels=texts,
        startangle=90,
        counterclock=False,
        labeldistance=middle / outer,
        rotatelabels=True,
        wedgeprops={"width": outer - inner, "edgecolor": "white"},
        textprops={"color": ink, "ha": "center", "va": "center", "rotation_mode": "anchor"},
    )
    for wedge, label in zip(wedges, labels, strict=True):
        arc = math.radians(wedge.theta2 - wedge.theta1) * middle * POINTS_PER_RADIUS
        fitting = min(size, arc / 1.15, 16 * size / len(label.get_text()))  # no higher, and no longer, than the slice
        label.set(fontsize=fitting, visible=fitting >= SMALLEST_TEXT)


def _style(ink: str) -> dict[str, Any]:
    colored = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = {"svg.fonttype": "none", "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}
    return style | {"axes.spines.top": False, "axes.spines.right": False} | dict.fromkeys(colored, ink)


def _svg(description: str, draw: Callable[[], Figure]) -> str:
    """Draw with the report's style, and put the SVG into the page in the page's own colour of text."""
    with matplotlib.rc_context(_style(INK) | {"svg.hashsalt": description}):  # equal data, equal ids; none twice a page
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", svg[svg.index("<svg") :])
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg).replace(INK, "currentColor")
    label = f'<svg role="img" aria-label="{escape(description)}"'
    return Markup(f"<figure>{svg.replace('<svg', label, 1)}</figure>")
