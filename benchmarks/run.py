"""Run a set of benchmarks, one process after another; each appends its lines to benchmarks/results/<device>.jsonl.

    python benchmarks/run.py operators
    python benchmarks/run.py decode --list
    python benchmarks/run.py gpu --limit 60 --within 300

Then `python benchmarks/report.py` writes the tables. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETS = {
    "operators": (
        "bench_adaln.py",
        "bench_channel_norm.py",
        "bench_diffusion_step.py",
        "bench_gelu.py",
        "bench_group_norm_silu.py",
        "bench_group_norm_silu.py --dtype bfloat16",
        "bench_group_norm_silu.py --channels 72 --size 64 --modulated --dtype bfloat16",
        "bench_group_norm_silu.py --batch 2 --channels 16 --groups 4 --size 64",
        "bench_linear.py",
        "bench_patchify.py",
        "bench_volume_attention.py",
        "bench_vq_nearest.py",
        "bench_window_attention.py",
    ),
    "conv": ("bench_norm_silu_conv3d.py",),
    "models": (
        "bench_autoencoder.py --repeats 3",
        "bench_autoencoder.py --dtype float32 --repeats 3",
        "bench_biflownet_step.py",
    ),
    "controlnet": ("bench_controlnet.py",),
    "decode": ("bench_joint_decode.py --sizes 128 256 --budgets 0.9GB 3GB --peers eager best disjoint",),
    "backend": (
        "bench_backend.py --only published --bfloat16 --budget 900MB --small-pages",
        "bench_backend.py --only quantisers",
        "bench_backend.py --only maisi --size 160 --bfloat16 --budget 1.1GB --repeats 1 --cold",
    ),
    "sampler": ("bench_sampler.py",),
    "sample": (
        "sample_512.py --peer",
        "sample_512.py --model demo --anatomy mr_t1_brain --size 192 --solver dpmsolver++ --steps 20",
    ),
    # the most important first: on_gpu.sh runs as many as fit into its time
    "gpu": (
        "sample_512.py",
        "bench_joint_decode.py --sizes 512 --budgets 30GB 8GB --peers --repeats 2",
        "bench_biflownet_step.py --size 64",
        "bench_vq_nearest.py",
        "bench_window_attention.py",
        "bench_group_norm_silu.py --dtype bfloat16",
        "bench_norm_silu_conv3d.py",
        "bench_joint_decode.py --sizes 256 --budgets 8GB --repeats 2",
        "sample_512.py --size 256 --peer",
        "bench_adaln.py --tokens 64",
        "bench_channel_norm.py --size 32",
        "bench_diffusion_step.py",
        "bench_gelu.py",
        "bench_patchify.py --size 512",
        "bench_autoencoder.py --repeats 3",
        "bench_controlnet.py --size 64",
        "bench_sampler.py --no-ddpm",
    ),
}


def run(command: str, limit: float | None) -> str:
    """ "passed" or why it failed. What runs longer than `limit` seconds is ended with all that it started."""
    process = subprocess.Popen(
        [sys.executable, *shlex.split(f"benchmarks/{command}")], cwd=ROOT, start_new_session=True
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"failed: longer than {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "passed" if code == 0 else f"failed: exit code {code}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = [name for name in SETS if name != "gpu"]
    parser.add_argument("sets", nargs="+", choices=[*SETS, "all"], metavar="set", help=f"{', '.join(SETS)} or all")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for each command; then it is ended")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="for all of them; the rest is not run")
    parser.add_argument("--summary", type=Path, help="file to which a line per command is appended")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended as well
    names = everything if "all" in arguments.sets else dict.fromkeys(arguments.sets)
    start, failed = time.monotonic(), []
    for command in (command for name in names for command in SETS[name]):
        print(f"+ python benchmarks/{command}", flush=True)
        if arguments.list:
            continue
        begin = time.monotonic()
        left = None if arguments.within is None else arguments.within - (begin - start)
        limits = [seconds for seconds in (arguments.limit, left) if seconds is not None]
        result = "failed: no time left" if left is not None and left < 5 else run(command, min(limits, default=None))
        if result != "passed":
            failed.append(f"{command}: {result}")
        if arguments.summary:
            with arguments.summary.open("a") as file:
                file.write(f"{command}: {result}, {time.monotonic() - begin:.0f} s\n")
    for line in failed:
        print(line, file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
