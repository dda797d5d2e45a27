"""The web page of data_report.py: its charts, drawn by matplotlib as SVG, its tables, and the sunburst as a PNG.

The page is one file and loads nothing. Text and axes of the charts take the colour of the page's text, and the bars
have colours that stand out on white and on black, so that one drawing serves light and dark.
"""

import colorsys
import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK = "#010203"  # stands for the colour of the page's text until the SVG is in the page
GREY = "#767676"  # legible on white and on black: text of the PNG, whose surroundings are unknown
COLORS = ("#3f86c9", "#d9772b")  # the first data set, the second
SHOWN = 12  # rows or pairs that the page lists of each finding; report.json has more
POINTS_PER_RADIUS = 310  # points from the centre of the sunburst to its edge
SMALLEST_TEXT = 4.5  # points; the table beneath the sunburst names what is too narrow for text
EXCERPT = 160  # characters of a text that a list shows
FIELDS = ("instruction", "input", "output")
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --faint: #5b6068; --line: #d5d8dc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #15171a; --faint: #a3a9b1; --line: #3a3e44; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
p { max-width: 48rem; } .faint, figcaption { color: var(--faint); font-size: .9rem; }
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
    sections = [
        f"<h1>{_escape(names)}</h1><p class=faint>Figures of data_report.py; report.json holds them all. Row numbers "
        "count from 0.</p>",
        _overview(reports),
        "<h2>Lengths in words</h2><p>Words are runs of characters between white space. The last bar holds the longest "
        "1 % and is open to the right. Inputs are those of the rows that have one.</p>",
        *(_length_chart(reports, field, "words") for field in FIELDS),
    ]
    if "tokens" in first:
        limit = first["tokens"]["model_max_length"]
        sections += [
            f"<h2>Lengths in tokens</h2><p>Tokenizer: {_escape(settings['tokenizer'])}. An example is the whole prompt "
            f"with the response and the end token, as training sees it; training cuts it at {limit} tokens.</p>",
            *(_length_chart(reports, field, "tokens") for field in FIELDS),
            _length_chart(reports, "example", "tokens", limit),
            _padding_chart(reports),
        ]
    sections += [
        "<h2>Root verbs and their objects</h2>",
        f"<p>Found by {_escape(first['root_verbs']['parser'])}. Inner ring: the 20 most frequent verbs that have a "
        "direct object; outer ring: up to four most frequent objects of each. A slice is as wide as the number of "
        "its rows.</p>",
        _figure(lambda: _sunburst(reports, INK), "Sunburst of root verbs and their direct objects"),
        *(_verb_table(report) for report in reports),
        "<h2>Duplicates and near-duplicates</h2><p>Near-duplicates are pairs of rows whose instructions have a ROUGE-L "
        f"F of more than {first['near_duplicates']['threshold']}; all pairs were compared.</p>",
        _near_duplicate_chart(reports),
        *(_duplicate_lists(report, examples) for report, examples in zip(reports, data_sets, strict=True)),
        "<h2>Similarity to the seed tasks</h2>"
        f"<p>Of each instruction to the nearest of {first['seeds']['seed_tasks']} seed tasks.</p>",
        _figure(
            lambda: _score_charts(reports, lambda r: r["seeds"]["scores"], "Nearest seed task", "rows"),
            "Histogram of the similarity of each row to its nearest seed task",
        ),
        "<h2>Outputs worth a look</h2><p>An output looks cut off if it leaves a code block open, ends on a comma, an "
        "opening bracket or a word such as “the”, or if its last line is a long sentence without an end. This is a "
        "hint, not a verdict.</p>",
        *(_output_lists(report, examples) for report, examples in zip(reports, data_sets, strict=True)),
    ]
    if "contamination" in first:
        sections += [
            f"<h2>Contamination</h2><p>Against the {first['contamination']['tasks']} tasks of "
            f"{_escape(settings['against'])}: tasks that some row repeats with a ROUGE-L F of more than 0.7.</p>",
            *(_contamination_chart(reports, key) for key in ("instruction", "instruction_and_input")),
            *(_contamination_list(report, examples) for report, examples in zip(reports, data_sets, strict=True)),
        ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{_escape(names)}: data report</title>"
        f'<meta name=viewport content="width=device-width, initial-scale=1">'
        f'<meta http-equiv=Content-Security-Policy content="{policy}"><style>{_CSS}</style></head>\n'
        f"<body{' class=compare' * (len(reports) > 1)}>\n{chr(10).join(sections)}\n</body></html>\n"
    )


def sunburst_png(report: dict, file: io.IOBase) -> None:
    """The sunburst of one data set on a transparent ground."""
    with matplotlib.rc_context(_STYLE):
        _sunburst([report], GREY).savefig(
            file, format="png", dpi=110, transparent=True, metadata={"Software": None}, bbox_inches="tight"
        )


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _figure(draw: Callable[[], Figure], description: str) -> str:
    """Draw with the report's style, and put the SVG into the page in the page's own colour of text."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": description}):  # equal data, equal ids; none twice in a page
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", svg[svg.index("<svg") :])
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg).replace(INK, "currentColor")
    label = f'<svg role="img" aria-label="{_escape(description)}"'
    return f"<figure>{svg.replace('<svg', label, 1)}</figure>"


def _axes(count: int, width: float = 5.6, height: float = 2.9) -> tuple[Figure, list]:
    """A figure with one chart a data set, side by side on the same scales."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = list(figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0])
    for ax in axes:
        ax.tick_params(colors=INK)
        ax.yaxis.set_tick_params(labelleft=True)
        for side in ("left", "bottom"):
            ax.spines[side].set_color(INK)
    return figure, axes


def _label(ax: Any, title: str, x: str, y: str) -> None:
    ax.set_title(title, color=INK, fontsize=11, loc="left")
    ax.set_xlabel(x, color=INK)
    ax.set_ylabel(y, color=INK)


def _length_chart(reports: Sequence[dict], field: str, unit: str, limit: int | None = None) -> str:
    def draw() -> Figure:
        figure, axes = _axes(len(reports))
        for ax, report, color in zip(axes, reports, COLORS, strict=False):
            lengths = report["lengths"][f"{field}_{unit}"]
            rows, starts = lengths["rows"], lengths["bin_starts"]
            width = starts[1] - starts[0]
            ax.bar(starts, [100 * c / max(rows, 1) for c in lengths["counts"]], width * 0.9, align="edge", color=color)
            summary = f"{unit} in the {field}"
            if rows:
                summary += f"\nmean {lengths['mean']:g}, median {lengths['median']:g}, longest {lengths['max']:,}"
            if limit:
                summary += f"; cut at {limit}: {_percent(report['tokens']['rows_cut'], rows)} of rows"
                if limit <= starts[-1] + width:
                    ax.axvline(limit, color=INK, linestyle="--", linewidth=1)
            _label(ax, f"{field.capitalize()}: {report['name']}, {rows:,} rows", summary, "% of rows")
        return figure

    return _figure(draw, f"Histogram of {field} lengths in {unit}")


def _padding_chart(reports: Sequence[dict]) -> str:
    def draw() -> Figure:
        figure, axes = _axes(len(reports))
        for ax, report, color in zip(axes, reports, COLORS, strict=False):
            shares = {size: 100 * share for size, share in report["tokens"]["padding_share"].items()}
            bars = ax.bar(list(shares), list(shares.values()), color=color)
            ax.bar_label(bars, [f"{share:.0f} %" for share in shares.values()], color=INK, fontsize=9)
            title = f"Padding: {report['name']}, {report['rows']:,} rows"
            _label(ax, title, "examples in a batch, random order", "% of token positions")
        return figure

    return _figure(draw, "Share of padding by batch size")


def _score_charts(reports: Sequence[dict], scores: Callable[[dict], dict], title: str, unit: str) -> Figure:
    """Bars of a similarity histogram of each data set, in % of its rows, pairs or tasks."""
    figure, axes = _axes(len(reports))
    for ax, report, color in zip(axes, reports, COLORS, strict=False):
        found = scores(report)
        starts, number = found["bin_starts"], found["rows"]
        width = starts[1] - starts[0]
        ax.bar(starts, [100 * c / max(number, 1) for c in found["counts"]], width * 0.9, align="edge", color=color)
        ax.set_xlim(starts[0], 1)
        of = f", of {report['rows']:,} rows" if unit != "rows" else ""
        _label(ax, f"{title}: {report['name']}, {number:,} {unit}{of}", "ROUGE-L F", f"% of {unit}")
    return figure


def _near_duplicate_chart(reports: Sequence[dict]) -> str:
    if not any(report["near_duplicates"]["pairs"] for report in reports):
        return ""
    return _figure(
        lambda: _score_charts(reports, lambda r: r["near_duplicates"]["scores"], "Near-duplicates", "pairs"),
        "Histogram of the similarities of near-duplicate pairs",
    )


def _contamination_chart(reports: Sequence[dict], key: str) -> str:
    title = "Nearest row, " + key.replace("_", " ")
    return _figure(
        lambda: _score_charts(reports, lambda r: r["contamination"][key]["scores"], title, "tasks"),
        "Histogram of the similarity of each evaluation task to its nearest row, by " + key.replace("_", " "),
    )


def _sunburst(reports: Sequence[dict], ink: str) -> Figure:
    figure = Figure(figsize=(9 * len(reports), 9.4), layout="constrained")
    for ax, report in zip(figure.subplots(1, len(reports), squeeze=False)[0], reports, strict=True):
        verbs = report["root_verbs"]["top"]
        shown = sum(count for verb in verbs for _, count in verb["objects"])
        ax.set_title(
            f"Root verbs and their objects: {report['name']}\n{shown:,} of {report['rows']:,} rows",
            color=ink,
            fontsize=14,
        )
        ax.set_aspect("equal")
        ax.axis("off")
        ax.set_xlim(-1.02, 1.02)
        ax.set_ylim(-1.02, 1.02)
        angle = 90.0  # degrees; from the top, clockwise
        for number, verb in enumerate(verbs):
            hue = number * 0.381966 % 1  # golden ratio: neighbours differ
            total = sum(count for _, count in verb["objects"])
            _slice(ax, angle, 360 * total / shown, 0.24, 0.58, _color(hue, 0.40, 0.55), "white", verb["verb"], 10)
            for position, (noun, count) in enumerate(verb["objects"]):
                color = _color(hue, 0.80 - 0.03 * (position % 2), 0.55)
                _slice(ax, angle, 360 * count / shown, 0.585, 1.0, color, "#101010", noun, 8.5)
                angle -= 360 * count / shown
    return figure


def _color(hue: float, lightness: float, saturation: float) -> tuple[float, float, float]:
    return colorsys.hls_to_rgb(hue, lightness, saturation)


def _slice(
    ax: Any, start: float, extent: float, inner: float, outer: float, color: Any, ink: str, text: str, size: float
):
    """A sector of a ring, clockwise from `start` degrees, its text written along the radius where it fits."""
    from matplotlib.patches import Wedge

    ax.add_patch(Wedge((0, 0), outer, start - extent, start, width=outer - inner, facecolor=color, edgecolor="white"))
    radius, middle = (inner + outer) / 2, start - extent / 2
    arc = math.radians(extent) * radius * POINTS_PER_RADIUS
    size = min(size, arc / 1.15, 16 * size / len(text))  # no higher than the slice, no longer than the ring is wide
    if size < SMALLEST_TEXT:
        return
    turned = middle + 180 if 90 < middle % 360 < 270 else middle
    x, y = radius * math.cos(math.radians(middle)), radius * math.sin(math.radians(middle))
    ax.text(x, y, text, rotation=turned, rotation_mode="anchor", ha="center", va="center", color=ink, fontsize=size)


def _table(rows: Sequence[Sequence[Any]], head: Sequence[str], numbers: int = 0) -> str:
    """An HTML table; the last `numbers` columns are set as numbers."""

    def line(cells, tag):
        first_number = len(cells) - numbers
        classes = [" class=number" if index >= first_number else "" for index in range(len(cells))]
        return (
            "<tr>" + "".join(f"<{tag}{c}>{_escape(x)}</{tag}>" for c, x in zip(classes, cells, strict=True)) + "</tr>"
        )

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _overview(reports: Sequence[dict]) -> str:
    def share(count: Callable[[dict], int]) -> list[str]:
        return [f"{count(r):,} ({_percent(count(r), r['rows'])})" for r in reports]

    rows = [
        ["rows", *(f"{r['rows']:,}" for r in reports)],
        ["rows with an input", *share(lambda r: r["rows_with_input"])],
        *(
            [f"{field}, mean words", *(r["lengths"][f"{field}_words"].get("mean", "–") for r in reports)]
            for field in FIELDS
        ),
        ["repeated rows", *share(lambda r: r["duplicates"]["whole_rows"]["count"])],
        ["repeated instruction and input", *share(lambda r: r["duplicates"]["prompts"]["count"])],
        ["near-duplicate pairs", *(f"{r['near_duplicates']['pairs']:,}" for r in reports)],
        ["rows in such a pair", *share(lambda r: r["near_duplicates"]["rows_in_a_pair"])],
        ["rows near a seed task (over 0.7)", *share(lambda r: r["seeds"]["over_threshold"]["count"])],
        ["empty outputs", *share(lambda r: r["outputs"]["empty"]["count"])],
        ["outputs that look cut off", *share(lambda r: r["outputs"]["truncated_looking"]["count"])],
        ["outputs with characters beyond ASCII", *share(lambda r: r["outputs"]["non_ascii"]["count"])],
        ["rows with a root verb", *share(lambda r: r["root_verbs"]["rows_with_verb"])],
        ["rows with a verb and an object", *share(lambda r: r["root_verbs"]["rows_with_object"])],
    ]
    if "tokens" in reports[0]:
        limit = reports[0]["tokens"]["model_max_length"]
        rows += [
            ["tokens in all", *(f"{r['tokens']['total']:,}" for r in reports)],
            [f"rows cut at {limit} tokens", *share(lambda r: r["tokens"]["rows_cut"])],
            ["rows of whose response nothing is left", *share(lambda r: r["tokens"]["rows_without_any_response"])],
        ]
    if "contamination" in reports[0]:
        for key in ("instruction", "instruction_and_input"):
            label = f"evaluation tasks repeated, {key.replace('_', ' ')}"
            found = [r["contamination"] for r in reports]
            rows.append([label, *(f"{c[key]['tasks_over_threshold']:,} of {c['tasks']:,}" for c in found)])
    return _table(rows, ["", *(r["name"] for r in reports)], numbers=len(reports))


def _verb_table(report: dict) -> str:
    rows = [
        [verb["verb"], ", ".join(f"{noun} {count}" for noun, count in verb["objects"]), verb["rows"]]
        for verb in report["root_verbs"]["top"]
    ]
    head = ["verb", "objects", "rows with an object"]
    return (
        f"<details><summary>{_escape(report['name'])}: the same as a table</summary>{_table(rows, head, 1)}</details>"
    )


def _excerpt(text: str, end: bool = False) -> str:
    text = " ".join(text.split())
    if len(text) <= EXCERPT:
        return text
    return "…" + text[-EXCERPT:] if end else text[:EXCERPT] + "…"


def _list(title: str, report: dict, count: int, rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """A count that unfolds into its first rows."""
    summary = f"{_escape(report['name'])}: {title}: {count:,}"
    if not count:
        return f"<p>{summary}</p>"
    more = f"<p class=faint>The first {len(rows)}; report.json lists more.</p>" if count > len(rows) else ""
    return f"<details><summary>{summary}</summary>{_table(rows, head)}{more}</details>"


def _duplicate_lists(report: dict, examples: Sequence[dict]) -> str:
    lists = []
    for key, title in (("whole_rows", "repeated rows"), ("prompts", "repeated instruction and input")):
        found = report["duplicates"][key]
        rows = [[a, b, _excerpt(examples[a]["instruction"])] for a, b in found["rows"][:SHOWN]]
        lists.append(_list(title, report, found["count"], rows, ["row", "repeats row", "instruction"]))
    near = report["near_duplicates"]
    rows = [
        [score, f"{a},\u00a0{b}", _excerpt(examples[a]["instruction"]), _excerpt(examples[b]["instruction"])]
        for score, a, b in near["most_similar"][:SHOWN]
    ]
    head = ["ROUGE-L F", "rows", "one instruction", "the other"]
    return "".join([*lists, _list("near-duplicate pairs, most alike first", report, near["pairs"], rows, head)])


def _output_lists(report: dict, examples: Sequence[dict]) -> str:
    lists = []
    for key, title in (
        ("empty", "empty"),
        ("truncated_looking", "look cut off"),
        ("non_ascii", "with characters beyond ASCII"),
    ):
        found = report["outputs"][key]
        cut = key == "truncated_looking"
        rows = [[row, _excerpt(examples[row]["output"], end=cut)] for row in found["rows"][:SHOWN]]
        lists.append(_list(title, report, found["count"], rows, ["row", "output, its end" if cut else "output"]))
    characters = report["outputs"]["non_ascii"]["rows_by_character"]
    if characters:
        listed = ", ".join(f"{character} {count:,}" for character, count in characters.items())
        lists.append(f"<p class=faint>Most frequent characters beyond ASCII, and rows with each: {_escape(listed)}</p>")
    return "".join(lists)


def _contamination_list(report: dict, examples: Sequence[dict]) -> str:
    lists = []
    for key in ("instruction", "instruction_and_input"):
        found = report["contamination"][key]["rows_over_threshold"]
        rows = [[s, row, task, _excerpt(examples[row]["instruction"])] for row, task, s in found["rows"][:SHOWN]]
        head = ["ROUGE-L F", "row", "task", "instruction of the row"]
        lists.append(_list(f"rows near a task, {key.replace('_', ' ')}", report, found["count"], rows, head))
    return "".join(lists)
