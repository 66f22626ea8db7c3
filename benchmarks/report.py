"""Write the README's table of results from benchmarks/results/*.jsonl: the newest line of each case on each device.

python benchmarks/report.py
"""

from __future__ import annotations

import json

from common import RESULTS, ROOT

_BEGIN, _END = "<!-- results: written by benchmarks/report.py -->\n", "<!-- end of results -->\n"


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.0f} ms"


def rows() -> list[str]:
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


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(_BEGIN)
    _, after = rest.split(_END)
    readme.write_text(before + _BEGIN + "\n".join(rows()) + "\n" + _END + after)


if __name__ == "__main__":
    main()
