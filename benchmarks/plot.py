"""Time and peak memory against the size of the volume, on one device, from its lines alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from meddiff.config import PRESETS

# what a case was measured on, in the words of its benchmark; a remark behind them keeps it out of the plot
_CASES = {
    "joint_decode": re.compile(rf"(?P<preset>{'|'.join(PRESETS)}), (?P<size>\d+)³, joint [\d.]+ GB"),
    "sample_512": re.compile(
        rf"sample, decode and write, (?P<preset>{'|'.join(PRESETS)}), (?P<size>\d+)³, (?P<how>.+?)"
        r"(, [\d.]+ GB for decoding)?"
    ),
}
_TITLES = {"joint_decode": "joint decode", "sample_512": "sampling, decoding and writing"}
_OURS, _FRUGAL = "meddiff", "meddiff, least memory"
_PEERS = {
    "eager": "PyTorch, eager, float32",
    "published": "as published, float32",
    "best": "PyTorch, compiled",
    "best_setting": "PyTorch, compiled",
    "disjoint": "disjoint tiles (seams)",
}
# mid-tones, to be read on white and on black
_INK, _GRID = "#7d858f", "#7d858f55"
_COLOURS = {
    _OURS: "#2f81f7",
    _FRUGAL: "#2f81f7",
    "PyTorch, eager, float32": "#d1762a",
    "as published, float32": "#d1762a",
    "PyTorch, compiled": "#9a6ad6",
    "disjoint tiles (seams)": "#2f9e5b",
}
_SIZES = (64, 128, 256, 512)
_LABEL = 7.5  # points
_STYLE = {
    "svg.hashsalt": "meddiff",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

Series = dict[str, list[list[float]]]  # name → [voxels along each axis, seconds, bytes or null], by size


def figures(lines: Iterable[dict]) -> dict[str, Series]:
    """Title → series, from the newest lines of one device, 64³ to 512³. What has one size only is left out.

    Where a decode was measured within several budgets, the one line is the fastest of each size, the other the one with
    the least memory.
    """
    found: dict[str, dict[str, dict[int, list[list[float]]]]] = {}
    for line in lines:
        case = _CASES.get(line["benchmark"], re.compile(r"(?!)")).fullmatch(line["case"])
        if case is None:
            continue
        size, how = int(case["size"]), case.groupdict().get("how")
        if not _SIZES[0] <= size <= _SIZES[-1]:
            continue
        words = [_TITLES[line["benchmark"]], case["preset"], *filter(None, [how]), line["dtype"]]
        series = found.setdefault(", ".join(words), {})
        series.setdefault(_OURS, {}).setdefault(size, []).append(_point(size, line))
        for name, peer in line.get("peers", {}).items():
            if "ms_p50" in peer:
                series.setdefault(_PEERS[name], {}).setdefault(size, []).append(_point(size, peer))
    return {title: _lines(series) for title, series in sorted(found.items()) if len(series[_OURS]) > 1}


def _point(size: int, figures: dict) -> list:
    peak = figures["peak_bytes"]
    return [size, float(f"{figures['ms_p50'] / 1e3:.4g}"), peak and float(f"{peak:.4g}")]


def _lines(series: dict[str, dict[int, list[list]]]) -> Series:
    def chosen(name: str, key: int) -> list[list]:
        """Of each size the point with the least seconds (key 1) or bytes (key 2)."""
        return [min(points, key=lambda point: point[key] or 0) for _, points in sorted(series[name].items())]

    lines = {name: chosen(name, 1) for name in series}
    frugal = chosen(_OURS, 2)
    if frugal != lines[_OURS]:
        lines[_FRUGAL] = frugal
    return lines


def write_plot(path: Path, device: str, figures: dict[str, Series]) -> None:
    """Draw the figures into an SVG, two panels each, with the figures in its description.

    A file that was made from the same figures stays as it is, for its bytes depend on matplotlib's version: to draw it
    anew, delete it.
    """
    description = json.dumps({"device": device, **figures}, ensure_ascii=False)
    if path.exists() and described(path) == description:
        return
    with matplotlib.rc_context(_STYLE):
        metadata = {"Date": None, "Creator": None, "Title": device, "Description": description}
        draw(device, figures).savefig(path, format="svg", transparent=True, metadata=metadata)


def described(path: Path) -> str | None:
    """The description in an SVG that `write_plot` made."""
    found = ElementTree.parse(path).find(".//{http://purl.org/dc/elements/1.1/}description")
    return None if found is None else found.text


def draw(device: str, figures: dict[str, Series]) -> Figure:
    figure = Figure(figsize=(9, 0.5 + 2.9 * len(figures)), layout="constrained")
    figure.suptitle(device, size=8, x=0.01, ha="left")
    panels = []
    for (title, series), (time, memory) in zip(figures.items(), figure.subplots(len(figures), 2, squeeze=False)):
        seconds = {name: [point[:2] for point in points] for name, points in series.items()}
        gib = {name: [(size, peak / 2**30) for size, _, peak in points if peak] for name, points in series.items()}
        panels += [(time, f"{title}: seconds", seconds), (memory, "peak memory, GiB", gib)]
    for axes, title, series in panels:
        _panel(axes, title, series)
    figure.draw_without_rendering()  # settles where everything is
    for axes, _, series in panels:
        _name(axes, {name: points[-1] for name, points in series.items() if points})
    return figure


def _panel(axes: Axes, title: str, series: dict[str, list]) -> None:
    axes.set_title(title, loc="left", size=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    for name, points in series.items():
        width, style = 1.4 if name in (_OURS, _FRUGAL) else 0.9, "--" if name == _FRUGAL else "-"
        x, y = zip(*points) if points else ((), ())
        axes.plot(x, y, color=_COLOURS[name], linewidth=width, linestyle=style, marker="o", markersize=3)
    axes.set_xlim(_SIZES[0] * 0.93, _SIZES[-1] * 3.6)  # on the right the names
    axes.spines["bottom"].set_bounds(_SIZES[0], _SIZES[-1])
    axes.set_xticks(_SIZES, [f"{size}³" for size in _SIZES])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 3), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    axes.hlines(ticks, _SIZES[0], _SIZES[-1], _GRID, linewidth=0.5, zorder=0)
    axes.set_ylim(low, high)


def _name(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """The names of the series in a column, each as high as its last point, or pushed up where another one stands."""
    above = float("-inf")
    for name, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        height = axes.transData.transform((x, y))[1]
        above = max(height, above + 1.3 * _LABEL * axes.figure.dpi / 72)
        _, place = axes.transData.inverted().transform((0, above))
        leader = {"arrowstyle": "-", "color": _COLOURS[name], "linewidth": 0.5, "linestyle": ":"}
        axes.annotate(
            name, (x, y), (1.2 * _SIZES[-1], place), va="center", size=_LABEL, color=_COLOURS[name],
            annotation_clip=False, in_layout=False,
            arrowprops=leader | {"shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip
