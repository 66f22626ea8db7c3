"""Run a set of benchmarks, one process after another; each appends its lines to benchmarks/results/<device>.jsonl.

    python benchmarks/run.py operators
    python benchmarks/run.py decode --list

Then `python benchmarks/report.py` writes the tables. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

from common import ROOT

SETS = {
    "operators": (
        "bench_adaln.py",
        "bench_channel_norm.py",
        "bench_diffusion_step.py",
        "bench_group_norm_silu.py",
        "bench_group_norm_silu.py --dtype bfloat16",
        "bench_group_norm_silu.py --channels 72 --size 64 --modulated --dtype bfloat16",
        "bench_group_norm_silu.py --batch 2 --channels 16 --groups 4 --size 64",
        "bench_patchify.py",
        "bench_vq_nearest.py",
        "bench_window_attention.py",
    ),
    "models": (
        "bench_autoencoder.py --repeats 3",
        "bench_autoencoder.py --dtype float32 --repeats 3",
        "bench_biflownet_step.py",
    ),
    "sample": ("sample_512.py", "sample_512.py --model demo --size 192 --solver dpm --steps 20"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", choices=[*SETS, "all"], metavar="set", help=f"{', '.join(SETS)} or all")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    arguments = parser.parse_args()
    names = SETS if "all" in arguments.sets else dict.fromkeys(arguments.sets)
    failed = []
    for command in (command for name in names for command in SETS[name]):
        print(f"+ python benchmarks/{command}", flush=True)
        if not arguments.list:
            done = subprocess.run([sys.executable, *shlex.split(f"benchmarks/{command}")], cwd=ROOT)
            failed += [command] * (done.returncode != 0)
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
