"""Write the generated tables: results into the README, the demo's scores into the README and its model card.

    python benchmarks/report.py

Results are the newest line of each case on each device in benchmarks/results/*.jsonl, scores those that
`meddiff evaluate` wrote beside the demo's weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from common import RESULTS, ROOT

_DEMO = ROOT / "meddiff" / "demo"
_SCORES = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "seam": "seam score"}


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.0f} ms"


def results() -> list[str]:
    newest = {}
    for file in sorted(RESULTS.glob("*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            newest[line["device"], line["benchmark"], line["case"], line["dtype"]] = line
    table = ["| case | dtype | time, p50 | peak memory | device | command |", "|---|---|---|---|---|---|"]
    for (device, _, case, dtype), line in sorted(newest.items()):
        peak = "–" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 2**30:.2f} GiB"
        place = f"{device}, PyTorch {line['versions']['torch']}"
        table.append(f"| {case} | {dtype} | {_seconds(line['ms_p50'])} | {peak} | {place} | `{line['command']}` |")
    return table


def scores() -> list[str]:
    """Means of the demo's reconstructions: of brains that were not in training, and of the template itself."""
    table = [
        f"| reconstruction | of | {' | '.join(_SCORES.values())} | of the original |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [
        ("after stage 1, patches decoded by themselves", "evaluation_stage1.json", "disjoint_"),
        ("after stage 2, decoded jointly", "evaluation.json", ""),
    ]
    for title, file, prefix in rows:
        volumes = json.loads((_DEMO / file).read_text())["volumes"]
        template = [v for v in volumes if v["file"].startswith("template_")]
        unseen = [v for v in volumes if v not in template]
        for what, group in ((f"{len(unseen)} unseen deformations", unseen), ("MNI152, T1 and T2-like", template)):
            means = [f"{fmean(v[prefix + name] for v in group):.{1 if name == 'psnr' else 3}f}" for name in _SCORES]
            original = fmean(v["seam_original"] for v in group)
            table.append(f"| {title} | {what} | {' | '.join(means)} | {original:.3f} |")
    return table


def write_table(file: Path, name: str, table: list[str]) -> None:
    """Put `table` between the comments that mark it in a Markdown file."""
    begin, end = f"<!-- {name}: written by benchmarks/report.py -->\n", f"<!-- end of {name} -->\n"
    before, rest = file.read_text().split(begin)
    _, after = rest.split(end)
    file.write_text(before + begin + "\n".join(table) + "\n" + end + after)


if __name__ == "__main__":
    write_table(ROOT / "README.md", "results", results())
    for markdown in (ROOT / "README.md", _DEMO / "README.md"):
        write_table(markdown, "scores", scores())
