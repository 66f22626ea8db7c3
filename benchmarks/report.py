"""Write the tables of results: whole jobs into the README, everything into benchmarks/results/README.md.

    python benchmarks/report.py

A row is the newest line of its case on its device in benchmarks/results/*.jsonl. What no GPU has run yet says so.
"""

from __future__ import annotations

import json

from common import RESULTS, ROOT

_BEGIN, _END = "<!-- results: written by benchmarks/report.py -->\n", "<!-- end of results -->\n"
_JOBS = ("autoencoder", "biflownet_step", "joint_decode", "sample_512")
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


def row(line: dict, with_name: bool) -> list[str]:
    """The best peer is the one that comes closest, or is furthest ahead."""
    peers = {name[2:].replace("_", " "): ratio for name, ratio in line.items() if name.startswith("x_")}
    best = min(peers, key=peers.get, default=None)
    return [
        f"{line['benchmark']}: {line['case']}" if with_name else line["case"],
        line["dtype"],
        _time(line["ms_p50"]),
        "–" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 2**30:.2f} GiB",
        "–" if best is None else f"{peers[best]:.2f} ({best})",
        f"{line['device']}, PyTorch {line['versions']['torch']}",
        f"`{line['command']}`",
    ]


def table(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [_HEADER, ["---"] * len(_HEADER), *rows])


def main() -> None:
    lines = newest()
    everything = [row(line, with_name=True) for line in lines.values()]
    on_gpu = {benchmark for device, benchmark, *_ in lines if "NVIDIA" in device}
    operators = {file.stem for file in (ROOT / "kernels").glob("[a-z]*.py")}
    for benchmark in sorted((operators | {benchmark for _, benchmark, *_ in lines}) - on_gpu):
        everything.append([benchmark, "", "not yet run on a GPU", "", "", "NVIDIA", "`benchmarks/on_gpu.sh`"])
    text = "Every measured case; written by `python benchmarks/report.py` from the lines in this folder.\n\n"
    (RESULTS / "README.md").write_text(text + table(everything))

    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(_BEGIN)
    _, after = rest.split(_END)
    jobs = table([row(line, with_name=False) for line in lines.values() if line["benchmark"] in _JOBS])
    readme.write_text(before + _BEGIN + jobs + _END + after)


if __name__ == "__main__":
    main()
