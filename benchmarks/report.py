"""Write what the results say: whole jobs into the README, everything into benchmarks/results/README.md, time and memory
against the size of the volume into a plot per device, and the scores of the model that ships into the README and its
card.

    python benchmarks/report.py

A result is the newest line of its case on its device in benchmarks/results/*.jsonl; what no GPU has run yet says so.
Scores are those that `meddiff evaluate` wrote beside the model's weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from common import RESULTS, ROOT, slug
from plot import figures, write_plot

_DEMO = ROOT / "meddiff" / "demo"
_SCORES = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "seam": "seam score"}
_EVALUATIONS = {  # what was decoded how → file of the evaluation, prefix of its scores
    "after stage 1, patches decoded by themselves": ("evaluation_stage1.json", "disjoint_"),
    "after stage 2, decoded jointly": ("evaluation.json", ""),
}
_TASKS = {  # file of a ControlNet's evaluation → its name, what its samples are compared with, prefix of that, scores
    "task_fast_mri.json": (
        "demo-fast-mri",
        "the zero-filled image",
        "condition_",
        {"psnr": "PSNR, dB", "ssim": "SSIM"},
    ),
    "task_masks.json": (
        "demo-mask",
        "the true image",
        "original_",
        {"dice_white_matter": "Dice of white matter", "dice_grey_matter": "Dice of grey matter"},
    ),
}
_JOBS = ("biflownet_step", "joint_decode", "sample_512")
_DISTANCES = {"latent, RMSE": "{:.4f}", "volume, RMSE": "{:.4f}", "volume, PSNR in dB": "{:.1f}"}
_SOLVERS = """## Solvers

Distances are to DDIM (eta 0) in every step of the schedule, from the same noise. DDPM draws fresh noise: its distance
is that of two samples of one class. `python benchmarks/bench_sampler.py`.

"""
_HEADER = ["case", "dtype", "time, p50", "peak memory", "× best peer", "device", "command"]


def _time(milliseconds: float) -> str:
    if milliseconds >= 1e3:
        return f"{milliseconds / 1e3:.2f} s"
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"


def newest() -> dict[tuple[str, ...], dict]:
    """(device, benchmark, case, dtype) → its newest line."""
    lines = {}
    for file in sorted(RESULTS.glob("*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            lines[line["device"], line["benchmark"], line["case"], line["dtype"]] = line
    return dict(sorted(lines.items()))


def _peer(line: dict) -> str:
    """The best peer: the one that comes closest, or is furthest ahead."""
    peers = {name[2:]: ratio for name, ratio in line.items() if name.startswith("x_")}
    if not peers:
        return "–"
    best = min(peers, key=peers.get)
    figures = line.get("peers", {}).get(best)
    words = [best.replace("_", " "), *([] if figures is None else [_time(figures["ms_p50"]), _memory(figures)])]
    return f"{peers[best]:.2f} ({', '.join(words)})"


def _memory(figures: dict) -> str:
    return "–" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 2**30:.2f} GiB"


def row(line: dict, with_name: bool) -> list[str]:
    return [
        f"{line['benchmark']}: {line['case']}" if with_name else line["case"],
        line["dtype"],
        _time(line["ms_p50"]),
        _memory(line),
        _peer(line),
        f"{line['device']}, PyTorch {line['versions']['torch']}",
        f"`{line['command']}`",
    ]


def scores() -> list[list[str]]:
    """Means over the brains that were not in training, and over the template itself."""
    rows = []
    for title, (file, prefix) in _EVALUATIONS.items():
        volumes = json.loads((_DEMO / file).read_text())["volumes"]
        groups: dict[str, list[dict]] = {}
        for volume in volumes:
            contrast = "T1" if volume["file"].endswith("mr_t1_brain.nii.gz") else "T2-like"
            what = "MNI152, not deformed" if volume["file"].startswith("template_") else "unseen deformations"
            groups.setdefault(f"{contrast}, {'×'.join(map(str, volume['size']))}, {what}", []).append(volume)
        for what, group in groups.items():
            means = [f"{fmean(v[prefix + key] for v in group):.{1 if key == 'psnr' else 3}f}" for key in _SCORES]
            rows.append([title, what, *means, f"{fmean(v['seam_original'] for v in group):.3f}"])
    return rows


def task_scores() -> list[list[str]]:
    """What the ControlNets of the demo reach: means over brains that were not in training, of each size."""
    rows = []
    for file, (control, other, prefix, titles) in _TASKS.items():
        groups: dict[str, list[dict]] = {}
        for volume in json.loads((_DEMO / file).read_text())["volumes"]:
            groups.setdefault("×".join(map(str, volume["size"])), []).append(volume)
        for size, group in groups.items():
            for key, title in titles.items():
                means = (fmean(v[name] for v in group) for name in (key, prefix + key))
                digits = 1 if key == "psnr" else 3
                rows.append([f"`{control}`", size, title, *(f"{mean:.{digits}f}" for mean in means), other])
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---"] * len(header), *rows])


def insert(file: Path, name: str, text: str) -> None:
    """Put `text` between the comments that mark its place in a Markdown file."""
    begin, end = f"<!-- {name}: written by benchmarks/report.py -->\n", f"<!-- end of {name} -->\n"
    before, rest = file.read_text().split(begin)
    _, after = rest.split(end)
    file.write_text(before + begin + text + end + after)


def plots(lines: Iterable[dict]) -> str:
    """Draw a plot for each device that has anything to plot; what shows them in Markdown."""
    devices: dict[str, list[dict]] = {}
    for line in lines:
        devices.setdefault(line["device"], []).append(line)
    text = ""
    for device, of_device in devices.items():
        if found := figures(of_device):
            path = RESULTS / f"{slug(device)}.svg"
            write_plot(path, device, found)
            text += f"![time and peak memory against the size of the volume, {device}]({path.name})\n\n"
    return text


def solvers(lines: Iterable[dict]) -> str:
    """Tables of solver and steps, in Markdown: what each costs, and how far it ends from DDIM in all steps."""
    cases: dict[str, list[dict]] = {}
    for line in lines:
        if "of" in line:  # else of a version that measured other distances
            cases.setdefault(f"{line['of']}, {line['dtype']}; {line['device']}", []).append(line)
    text = ""
    for case, found in cases.items():
        rows = []
        for line in sorted(found, key=lambda line: (line["solver"], line["steps"])):
            figures = [line.get(key) for key in ("latent_rmse", "volume_rmse", "volume_psnr")]
            cells = ["–" if value is None else form.format(value) for value, form in zip(figures, _DISTANCES.values())]
            times = _time(1e3 * line["sample_seconds"]), _time(line["ms_p50"])
            rows.append([line["solver"], str(line["steps"]), *times, *cells])
        header = ["solver", "steps", "sampling", "sampling and decoding", *_DISTANCES]
        text += f"{case}:\n\n{table(header, rows)}\n"
    return text and _SOLVERS + text


def main() -> None:
    lines = newest()
    runs = [lines.pop(key) for key in list(lines) if key[1] == "on_gpu"]
    everything = [row(line, with_name=True) for line in lines.values() if line["benchmark"] != "sampler"]
    on_gpu = {benchmark for device, benchmark, *_ in lines if "NVIDIA" in device}
    operators = {file.stem for file in (ROOT / "kernels").glob("[a-z]*.py")}
    for benchmark in sorted((operators | {benchmark for _, benchmark, *_ in lines}) - on_gpu):
        everything.append([benchmark, "", "not yet run on a GPU", "", "", "NVIDIA", "`benchmarks/on_gpu.sh`"])
    text = "Every measured case; written by `python benchmarks/report.py` from the lines in this folder.\n\n"
    text += plots(lines.values()) + table(_HEADER, everything)
    if of_solvers := solvers(lines.values()):
        text += "\n" + of_solvers.rstrip("\n") + "\n"
    for run in runs:
        text += f"\n## benchmarks/on_gpu.sh on {run['machine']}, {run['date'][:10]}\n\n"
        text += "".join(f"- {part}\n" for part in [*run["parts"], *run["tests"]["failed"]])
    (RESULTS / "README.md").write_text(text)
    jobs = {}  # of several processors that ran a case, or several GPUs, the last one
    for line in sorted(lines.values(), key=lambda line: line["date"]):
        if line["benchmark"] in _JOBS:
            jobs["NVIDIA" in line["device"], line["benchmark"], line["case"], line["dtype"]] = line
    rows = [row(line, with_name=False) for _, line in sorted(jobs.items())]
    insert(ROOT / "README.md", "results", table(_HEADER, rows))
    header, quality = ["reconstruction", "of", *_SCORES.values(), "of the original"], scores()
    insert(_DEMO / "README.md", "scores", table(header, quality))
    tasks = ["ControlNet", "T1 volumes of", "score", "steered sample", "for comparison", "that of"]
    insert(_DEMO / "README.md", "tasks", table(tasks, task_scores()))
    insert(ROOT / "README.md", "scores", table(header, [row for row in quality if row[1].startswith("T1, 192")]))


if __name__ == "__main__":
    main()
