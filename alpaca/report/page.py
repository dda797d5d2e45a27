"""The web page of data_report.py: its charts, drawn by matplotlib as SVG, its tables, and the sunburst as a PNG.

The page is one file and loads nothing. Text and axes of the charts take the colour of the page's text, and the bars
have colours that stand out on white and on black, so that one drawing serves light and dark.
"""

import colorsys
import functools
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from alpaca.report.verb_noun import INSTALL

INK = "#010203"  # stands for the colour of the page's text until the SVG is in the page
GREY = "#767676"  # legible on white and on black: text of the PNG, whose surroundings are unknown
COLORS = ("#3f86c9", "#d9772b")  # the first data set, the second
SHOWN = 12  # rows or pairs that the page lists of each finding; report.json has more
POINTS_PER_RADIUS = 310  # points from the centre of the sunburst to its edge
SMALLEST_TEXT = 4.5  # points; the table beneath the sunburst names what is too narrow for text
EXCERPT = 160  # characters of a text that a list shows
FIELDS = ("instruction", "input", "output")
BOTH_WAYS = {"instruction": "instruction", "instruction_and_input": "instruction and input"}  # contamination, in words
SUNBURST = "Sunburst of root verbs and their direct objects"

_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --faint: #5b6068; --line: #d5d8dc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #15171a; --faint: #a3a9b1; --line: #3a3e44; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
p { max-width: 48rem; } .faint { color: var(--faint); font-size: .9rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; max-width: 100%; overflow-x: auto; }
svg { max-width: 100%; height: auto; } .compare svg { min-width: 44rem; }
svg text { font-family: system-ui, sans-serif !important; }
summary { cursor: pointer; padding: .2rem 0; } details { margin: .3rem 0; }
"""


def build(reports: Sequence[dict], data_sets: Sequence[Sequence[dict]], settings: dict[str, Any]) -> str:
    """The whole page. `reports` are the data sets of report.json, `data_sets` their examples, for the excerpts."""
    names = " and ".join(report["name"] for report in reports)
    first = reports[0]
    pairs = list(zip(reports, data_sets, strict=True))
    sections = [
        f"<h1>{_escape(names)}</h1><p class=faint>Figures of data_report.py; report.json holds them all. Row numbers "
        "count from 0.</p>",
        _overview(reports),
        "<h2>Lengths in words</h2><p>Words are runs of characters between white space. The last bar holds the longest "
        "1 % and is open to the right. Inputs are those of the rows that have one.</p>",
        *(_length_charts(reports, field, "words") for field in FIELDS),
    ]
    if "tokens" in first:
        limit = first["tokens"]["model_max_length"]
        sections += [
            f"<h2>Lengths in tokens</h2><p>Tokenizer: {_escape(settings['tokenizer'])}. An example is the whole prompt "
            f"with the response and the end token, as training sees it; training cuts it at {limit} tokens.</p>",
            *(_length_charts(reports, field, "tokens") for field in (*FIELDS, "example")),
            _padding_charts(reports),
        ]
    sections.append("<h2>Root verbs and their objects</h2>")
    if first["root_verbs"]:
        sections += [
            f"<p>Found by {_escape(first['root_verbs']['parser'])}. Inner ring: the 20 most frequent verbs that have a "
            "direct object; outer ring: up to four most frequent objects of each. A slice is as wide as the number of "
            "its rows.</p>",
            _svg(SUNBURST, functools.partial(_sunburst, reports)),
            *map(_verb_table, reports),
        ]
    else:
        sections.append(f"<p>They need spaCy and its English model: <code>{_escape(INSTALL)}</code></p>")
    sections += [
        "<h2>Duplicates and near-duplicates</h2><p>Near-duplicates are pairs of rows whose instructions have a ROUGE-L "
        f"F of more than {first['near_duplicates']['threshold']}; all pairs were compared.</p>",
        _score_charts(reports, "Near-duplicates", "near-duplicate pairs", "pairs", lambda r: r["near_duplicates"]),
        *(_duplicate_lists(report, examples) for report, examples in pairs),
        "<h2>Similarity to the seed tasks</h2>"
        f"<p>Of each instruction to the nearest of {first['seeds']['seed_tasks']} seed tasks.</p>",
        _score_charts(reports, "Nearest seed task", "rows and their nearest seed tasks", "rows", lambda r: r["seeds"]),
        "<h2>Outputs worth a look</h2><p>An output looks cut off if it leaves a code block open, ends on a comma, an "
        "opening bracket or a word such as “the”, or if its last line is a long sentence without an end. This is a "
        "hint, not a verdict.</p>",
        *(_output_lists(report, examples) for report, examples in pairs),
    ]
    if "contamination" in first:
        sections += [
            f"<h2>Contamination</h2><p>Against the {first['contamination']['tasks']} tasks of "
            f"{_escape(settings['against'])}: tasks that some row repeats with a ROUGE-L F of more than 0.7.</p>",
        ]
        for key, words in BOTH_WAYS.items():
            what = f"evaluation tasks and their nearest rows, by {words}"
            find = functools.partial(lambda key, report: report["contamination"][key], key)
            sections.append(_score_charts(reports, f"Nearest row, {words}", what, "tasks", find))
        sections += [_contamination_lists(report, examples) for report, examples in pairs]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{_escape(names)}: data report</title>"
        f'<meta name=viewport content="width=device-width, initial-scale=1">'
        f'<meta http-equiv=Content-Security-Policy content="{policy}"><style>{_CSS}</style></head>\n'
        f"<body{' class=compare' * (len(reports) > 1)}>\n{chr(10).join(sections)}\n</body></html>\n"
    )


def sunburst_png(report: dict, file: io.IOBase) -> None:
    """The sunburst of one data set on a transparent ground."""
    with matplotlib.rc_context(_style(GREY)):
        figure = _sunburst([report])
        figure.savefig(file, format="png", dpi=110, transparent=True, metadata={"Software": None}, bbox_inches="tight")


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
    label = f'<svg role="img" aria-label="{_escape(description)}"'
    return f"<figure>{svg.replace('<svg', label, 1)}</figure>"


def _bar_charts(reports: Sequence[dict], description: str, y: str, draw: Callable[[Any, dict, str], str]) -> str:
    """A chart a data set, side by side on the same scales; `draw(axes, report, color)` returns its title."""

    def figure() -> Figure:
        figure = Figure(figsize=(5.6 * len(reports), 2.9), layout="constrained")
        for ax, report, color in zip(
            figure.subplots(1, len(reports), sharex=True, sharey=True, squeeze=False)[0], reports, COLORS, strict=False
        ):
            ax.set_title(draw(ax, report, color))
            ax.set_ylabel(y)
            ax.yaxis.set_tick_params(labelleft=True)
        return figure

    return _svg(description, figure)


def _bars(ax: Any, histogram: dict, color: str) -> None:
    starts, rows = histogram["bin_starts"], max(histogram["rows"], 1)
    width = 0.9 * (starts[1] - starts[0])
    ax.bar(starts, [100 * count / rows for count in histogram["counts"]], width, align="edge", color=color)


def _length_charts(reports: Sequence[dict], field: str, unit: str) -> str:
    def draw(ax: Any, report: dict, color: str) -> str:
        lengths = report["lengths"][f"{field}_{unit}"]
        _bars(ax, lengths, color)
        label = f"{unit} in the {field}"
        if lengths["rows"]:
            label += f"\nmean {lengths['mean']:g}, median {lengths['median']:g}, longest {lengths['max']:,}"
        if field == "example":
            limit, starts = report["tokens"]["model_max_length"], lengths["bin_starts"]
            label += f"; cut at {limit}: {_percent(report['tokens']['rows_cut'], lengths['rows'])} of rows"
            if limit <= starts[-1] + starts[1]:
                ax.axvline(limit, color=INK, linestyle="--", linewidth=1)
        ax.set_xlabel(label)
        return f"{field.capitalize()}: {report['name']}, {lengths['rows']:,} rows"

    return _bar_charts(reports, f"Histogram of {field} lengths in {unit}", "% of rows", draw)


def _padding_charts(reports: Sequence[dict]) -> str:
    def draw(ax: Any, report: dict, color: str) -> str:
        shares = {size: 100 * share for size, share in report["tokens"]["padding_share"].items()}
        ax.bar_label(ax.bar(shares.keys(), shares.values(), color=color), fmt="%.0f %%", fontsize=9)
        ax.set_xlabel("examples in a batch, random order")
        return f"Padding: {report['name']}, {report['rows']:,} rows"

    return _bar_charts(reports, "Share of padding by batch size", "% of token positions", draw)


def _score_charts(reports: Sequence[dict], title: str, what: str, unit: str, find: Callable[[dict], dict]) -> str:
    """Histograms of find(report)["scores"]; nothing where there is no score at all."""
    if not any(find(report)["scores"]["rows"] for report in reports):
        return ""

    def draw(ax: Any, report: dict, color: str) -> str:
        scores = find(report)["scores"]
        _bars(ax, scores, color)
        ax.set_xlim(scores["bin_starts"][0], 1)
        ax.set_xlabel("ROUGE-L F")
        of = f", of {report['rows']:,} rows" if unit != "rows" else ""
        return f"{title}: {report['name']}, {scores['rows']:,} {unit}{of}"

    return _bar_charts(reports, f"Histogram of the similarity of {what}", f"% of {unit}", draw)


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
        shown = f"{sum(rows for _, rows, _ in verbs):,} of {report['rows']:,} rows"
        title = f"Root verbs and their objects: {report['name']}\n{shown}"
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


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _table(rows: Sequence[Sequence[Any]], head: Sequence[str], numbers: int = 0) -> str:
    """An HTML table; the last `numbers` columns are set as numbers."""

    def line(cells: Sequence[Any], tag: str) -> str:
        classes = [""] * (len(cells) - numbers) + [" class=number"] * numbers
        return "".join(f"<{tag}{c}>{_escape(x)}</{tag}>" for c, x in zip(classes, cells, strict=True))

    return (
        f"<table>{''.join(f'<tr>{row}</tr>' for row in [line(head, 'th'), *(line(row, 'td') for row in rows)])}</table>"
    )


def _overview(reports: Sequence[dict]) -> str:
    def count(label: str, *keys: str) -> list[str]:
        return [label, *(f"{functools.reduce(dict.__getitem__, keys, report):,}" for report in reports)]

    def share(label: str, *keys: str) -> list[str]:
        found = [functools.reduce(dict.__getitem__, keys, report) for report in reports]
        return [label, *(f"{n:,} ({_percent(n, r['rows'])})" for n, r in zip(found, reports, strict=True))]

    rows = [
        count("rows", "rows"),
        share("rows with an input", "rows_with_input"),
        *([f"{f}, mean words", *(r["lengths"][f"{f}_words"].get("mean", "–") for r in reports)] for f in FIELDS),
        share("repeated rows", "duplicates", "whole_rows", "count"),
        share("repeated instruction and input", "duplicates", "prompts", "count"),
        count("near-duplicate pairs", "near_duplicates", "pairs"),
        share("rows in such a pair", "near_duplicates", "rows_in_a_pair"),
        share("rows near a seed task (over 0.7)", "seeds", "over_threshold", "count"),
        share("empty outputs", "outputs", "empty", "count"),
        share("outputs that look cut off", "outputs", "truncated_looking", "count"),
        share("outputs with characters beyond ASCII", "outputs", "non_ascii", "count"),
    ]
    if reports[0]["root_verbs"]:
        rows += [
            share("rows with a root verb", "root_verbs", "rows_with_verb"),
            share("rows with a verb and an object", "root_verbs", "rows_with_object"),
        ]
    if "tokens" in reports[0]:
        limit = reports[0]["tokens"]["model_max_length"]
        rows += [
            count("tokens in all", "tokens", "total"),
            share(f"rows cut at {limit} tokens", "tokens", "rows_cut"),
            share("rows of whose response nothing is left", "tokens", "rows_without_any_response"),
        ]
    if "contamination" in reports[0]:
        found = [report["contamination"] for report in reports]
        rows += [
            [
                f"evaluation tasks repeated, {words}",
                *(f"{c[k]['tasks_over_threshold']:,} of {c['tasks']:,}" for c in found),
            ]
            for k, words in BOTH_WAYS.items()
        ]
    return _table(rows, ["", *(r["name"] for r in reports)], numbers=len(reports))


def _verb_table(report: dict) -> str:
    rows = [
        [verb["verb"], ", ".join(f"{noun} {count}" for noun, count in verb["objects"]), verb["rows"]]
        for verb in report["root_verbs"]["top"]
    ]
    table = _table(rows, ["verb", "objects", "rows with an object"], 1)
    return f"<details><summary>{_escape(report['name'])}: the same as a table</summary>{table}</details>"


def _excerpt(text: str, end: bool = False) -> str:
    text = " ".join(text.split())
    if len(text) <= EXCERPT:
        return text
    return "…" + text[-EXCERPT:] if end else text[:EXCERPT] + "…"


def _list(report: dict, title: str, found: dict, head: Sequence[str], cells: Callable[..., Sequence[Any]]) -> str:
    """A finding's count, which unfolds into its first rows; `cells(*row)` fills the columns of a row."""
    summary = f"{_escape(report['name'])}: {title}: {found['count']:,}"
    if not found["count"]:
        return f"<p>{summary}</p>"
    rows = [cells(*row) if isinstance(row, list) else cells(row) for row in found["rows"][:SHOWN]]
    more = f"<p class=faint>The first {SHOWN}; report.json lists more.</p>" if found["count"] > SHOWN else ""
    return f"<details><summary>{summary}</summary>{_table(rows, head)}{more}</details>"


def _duplicate_lists(report: dict, examples: Sequence[dict]) -> str:
    def text(row: int) -> str:
        return _excerpt(examples[row]["instruction"])

    repeats, near = report["duplicates"], report["near_duplicates"]
    pairs = {"count": near["pairs"], "rows": near["most_similar"]}
    head, pairs_head = ["row", "repeats row", "instruction"], ["ROUGE-L F", "rows", "one instruction", "the other"]
    return (
        _list(report, "repeated rows", repeats["whole_rows"], head, lambda a, b: [a, b, text(a)])
        + _list(report, "repeated instruction and input", repeats["prompts"], head, lambda a, b: [a, b, text(a)])
        + _list(
            *(report, "near-duplicate pairs, most alike first", pairs, pairs_head),
            lambda score, a, b: [score, f"{a},\u00a0{b}", text(a), text(b)],
        )
    )


def _output_lists(report: dict, examples: Sequence[dict]) -> str:
    def cells(row: int) -> list[Any]:
        return [row, _excerpt(examples[row]["output"])]

    def ending(row: int) -> list[Any]:
        return [row, _excerpt(examples[row]["output"], end=True)]

    found, head = report["outputs"], ["row", "output"]
    lists = [
        _list(report, "empty", found["empty"], head, cells),
        _list(report, "look cut off", found["truncated_looking"], ["row", "output, its end"], ending),
        _list(report, "with characters beyond ASCII", found["non_ascii"], head, cells),
    ]
    if characters := found["non_ascii"]["rows_by_character"]:
        listed = ", ".join(f"{character} {count:,}" for character, count in characters.items())
        lists.append(f"<p class=faint>Most frequent characters beyond ASCII, and rows with each: {_escape(listed)}</p>")
    return "".join(lists)


def _contamination_lists(report: dict, examples: Sequence[dict]) -> str:
    def cells(row: int, task: int, score: float) -> list[Any]:
        return [score, row, task, _excerpt(examples[row]["instruction"])]

    head = ["ROUGE-L F", "row", "task", "instruction of the row"]
    return "".join(
        _list(report, f"rows near a task, {words}", report["contamination"][key]["rows_over_threshold"], head, cells)
        for key, words in BOTH_WAYS.items()
    )
