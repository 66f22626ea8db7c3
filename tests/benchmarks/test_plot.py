"""The plot of time and memory against size: what it shows, and that the ones in the tree show the lines beside them."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.text import Text

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def decode(size: int, budget: float, seconds: float, gigabytes: float | None, **peers: dict) -> dict:
    case = f"8x, {size}³, joint {budget:g} GB"
    peak = gigabytes and gigabytes * 1e9
    figures = {"ms_p50": 1e3 * seconds, "peak_bytes": peak, "peers": peers}
    return {"benchmark": "joint_decode", "case": case, "dtype": "bfloat16"} | figures


def sample(size: int, seconds: float, remark: str = "") -> dict:
    case = f"sample, decode and write, 8x, {size}³, ddim 10 steps{remark}"
    return {"benchmark": "sample_512", "case": case, "dtype": "bfloat16", "ms_p50": 1e3 * seconds, "peak_bytes": 2e9}


def test_series_are_sorted_and_every_budget_counts(script):
    plot = script("plot")
    eager = {"ms_p50": 9000.0, "peak_bytes": 4e9}
    lines = [
        decode(256, 3, 40, 3.3, eager={"not_run": "not enough memory"}, disjoint={"ms_p50": 38e3, "peak_bytes": None}),
        decode(256, 0.9, 60, 1.4),
        decode(128, 0.9, 5, 1.1, eager=eager),
        decode(128, 3, 4, 1.7, eager=eager),
        {"benchmark": "patchify", "case": "8x, 64³, joint 1 GB", "dtype": "bfloat16", "ms_p50": 1, "peak_bytes": 1},
    ]
    assert plot.figures(lines) == {
        "joint decode, 8x, bfloat16": {
            "meddiff": [[128, 4.0, 1.7e9], [256, 40.0, 3.3e9]],
            "meddiff, least memory": [[128, 5.0, 1.1e9], [256, 60.0, 1.4e9]],
            "PyTorch, eager, float32": [[128, 9.0, 4e9]],
            "disjoint tiles (seams)": [[256, 38.0, None]],
        }
    }


def test_one_size_is_no_figure(script):
    plot = script("plot")
    assert plot.figures([]) == {}
    lines = [sample(128, 6.6), sample(512, 2043, ", other work beside it")]
    assert plot.figures(lines) == {}
    for budget in ("", ", 12 GB for decoding", ", 7.5 GB for decoding"):
        assert plot.figures([*lines, sample(512, 600, budget)]) == {
            "sampling, decoding and writing, 8x, ddim 10 steps, bfloat16": {
                "meddiff": [[128, 6.6, 2e9], [512, 600.0, 2e9]]
            }
        }


def test_the_file_says_what_it_was_made_from_and_is_kept(script, tmp_path: Path):
    plot = script("plot")
    lines = [decode(128, 1, 5, 1, eager={"ms_p50": 9e3, "peak_bytes": 4e9}), decode(512, 8, 500, None), sample(64, 1)]
    figures, path, again = plot.figures([*lines, sample(128, 7)]), tmp_path / "a.svg", tmp_path / "b.svg"
    for file in (path, again):
        plot.write_plot(file, "a card", figures)
    assert path.read_bytes() == again.read_bytes()
    assert json.loads(plot.described(path)) == {"device": "a card", **figures}
    assert ElementTree.parse(path).find(".//{http://purl.org/dc/elements/1.1/}date") is None

    text = path.read_text().replace("#2f81f7", "#123456")  # as another version of matplotlib would draw it
    path.write_text(text)
    plot.write_plot(path, "a card", figures)
    assert path.read_text() == text
    plot.write_plot(path, "a card", plot.figures(lines))
    assert path.read_text() != text and "sampling" not in plot.described(path)


def test_names_do_not_stand_on_each_other(script):
    plot = script("plot")
    lines = []
    for size in (64, 128):
        peers = {name: {"ms_p50": 50.0 * size, "peak_bytes": 2e7 * size} for name in ("eager", "best", "disjoint")}
        lines += [decode(size, 1, size / 20, size / 50, **peers), decode(size, 2, size / 10, size / 51)]
    figure = plot.draw("a card", plot.figures(lines))
    for axes in figure.axes:
        figure.draw_without_rendering()
        boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
        assert len(boxes) == 5
        assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:]))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_plots_in_the_tree_show_the_lines_beside_them(script, path: Path):
    report, plot = script("report"), script("plot")
    report.RESULTS = RESULTS
    figures = plot.figures(line for line in report.newest().values() if report.slug(line["device"]) == path.stem)
    picture = path.with_suffix(".svg")
    assert picture.exists() == bool(figures)
    if figures:
        assert {**json.loads(plot.described(picture)), "device": None} == {"device": None, **figures}
