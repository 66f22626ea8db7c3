"""Joint decode within budgets of memory, against the untiled module and the published disjoint tiles, at the released
widths with random weights. Every case runs in a process of its own, so that its peak of resident memory is its own.

python benchmarks/bench_joint_decode.py --sizes 128 256 --budgets 0.9GB 3GB --peers eager best disjoint
python benchmarks/bench_joint_decode.py --sizes 512 --budgets 16GB 8GB --peers --repeats 1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import append_result, is_out_of_memory, limit_memory, print_table
from torch import Tensor, nn

from meddiff.config import PRESETS
from meddiff.decode import make_plan
from meddiff.decode.plan import device_figures
from meddiff.models import PatchVolumeAutoencoder
from meddiff.models.blocks import GroupNorm
from meddiff.resources import StageMeter, bytes_of, default_device, default_dtype
from meddiff.training.evaluation import seam_score

# norm of the difference to the joint decode over its norm, for outputs to count as the same
_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_TILE = 64  # voxels of a disjoint tile
# the untiled module as published (eager, float32, contiguous), at its best (compiled, channels-last), and the tiles
_PEERS = ("eager", "best", "disjoint")


class _PlainNorm(nn.Module):
    """GroupNorm and SiLU by PyTorch's own operators."""

    def __init__(self, norm: GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        h = F.group_norm(x, self.norm.num_groups, self.norm.weight, self.norm.bias, self.norm.eps)
        return F.silu(h) if self.norm.silu else h


def _plain(module: nn.Module) -> nn.Module:
    """The module with PyTorch's own layers instead of meddiff's, on the same parameters."""
    for name, child in module.named_children():
        setattr(module, name, _PlainNorm(child) if isinstance(child, GroupNorm) else _plain(child))
    for kind in (nn.Conv3d, nn.ConvTranspose3d):
        if isinstance(module, kind):
            module.__class__ = kind
    return module


def work(case: dict) -> dict:
    """One case, in this process: seconds of each repeat, peaks, and the seam score; the volume goes to a file."""
    device, dtype = torch.device(case["device"]), getattr(torch, case["dtype"])
    limit_memory(device)
    torch.manual_seed(0)
    autoencoder = PatchVolumeAutoencoder(PRESETS[case["preset"]].autoencoder).eval().requires_grad_(False)
    way = case["way"]
    n = case["size"] // autoencoder.config.downsample
    indices = torch.randint(autoencoder.config.n_codes, (1, n, n, n), generator=torch.Generator().manual_seed(1))
    autoencoder.to(device, torch.float32 if way == "eager" else dtype)
    rows = F.embedding(indices.to(device), autoencoder._code_table()).permute(0, 4, 1, 2, 3)
    result: dict = {}
    if way == "joint":
        layers = autoencoder.decoder.layers()
        plan = make_plan(layers, tuple(rows.shape), dtype, device, case["budget"])
        result |= {"planned_bytes": plan.peak_bytes, "flops": plan.flops, "planned_seconds": plan.seconds}

        def run() -> Tensor:
            return autoencoder.decode(indices, memory_budget=case["budget"])
    elif way == "disjoint":

        def run() -> Tensor:
            return autoencoder.decode(indices, joint=False, tile=_TILE)
    else:
        decoder = _plain(autoencoder.decoder)
        if way == "eager":
            decoder.to(memory_format=torch.contiguous_format)
        else:
            decoder, rows = torch.compile(decoder), rows.contiguous(memory_format=torch.channels_last_3d)

        def run() -> Tensor:
            return decoder(rows)

    with torch.inference_mode():
        if way == "best":
            run()  # compiles
        elif way != "joint" or case["size"] <= 256:
            autoencoder.decoder(rows[:, :, :2, :2, :2])
        loaded = StageMeter(device)
        with loaded.stage("loaded"):
            pass
        meter = StageMeter(device)
        for _ in range(case["repeats"]):
            with meter.stage("run"):
                volume = run()
            volume = volume.cpu() if case["size"] > 256 else volume.float().cpu()
    torch.save(volume, case["volume"])
    result["seconds"] = [stage.seconds for stage in meter.stages]
    result["peak_bytes"] = max(stage.peak_bytes or 0 for stage in meter.stages)
    result["loaded_bytes"] = loaded.stages[0].peak_bytes or 0
    if _TILE < case["size"] <= 256:
        result["seam_score"] = seam_score(volume.float(), _TILE)
    return result


def measure(case: dict, folder: Path) -> dict:
    """`work` in a process of its own, or {"failed": why}."""
    case = case | {"volume": str(folder / f"{case['name']}.pt")}
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def difference(folder: Path, name: str, other: str) -> float:
    a, b = (torch.load(folder / f"{n}.pt", mmap=True).flatten() for n in (name, other))
    parts = [(p.float() - q.float(), q.float()) for p, q in zip(a.split(2**26), b.split(2**26))]
    squares = [(d.double().square().sum(), q.double().square().sum()) for d, q in parts]
    return (sum(d for d, _ in squares) / sum(q for _, q in squares)).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=["8x"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128], help="voxels along each axis")
    parser.add_argument("--budgets", nargs="+", type=bytes_of, default=[900_000_000, 500_000_000])
    parser.add_argument("--peers", nargs="*", choices=_PEERS, default=_PEERS)
    parser.add_argument("--dtype", choices=list(_TOLERANCE))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        try:
            result = work(json.loads(arguments.case))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            result = {"failed": "not enough memory"}
        print(json.dumps(result))
        return

    device = arguments.device
    dtype = arguments.dtype or str(default_dtype(device)).removeprefix("torch.")
    figures, rows = device_figures(device), []
    for preset in arguments.presets:
        for size in arguments.sizes:
            common = {"preset": preset, "size": size, "dtype": dtype, "device": str(device)}
            common["repeats"] = arguments.repeats
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                ways = [{"way": "joint", "budget": b, "name": f"joint {b / 1e9:g} GB"} for b in arguments.budgets]
                ways += [{"way": peer, "name": peer} for peer in arguments.peers]
                results = {way["name"]: measure(common | way, folder) for way in ways}
                for way in ways:
                    report(way["name"], results, common, folder, figures, device, rows)
    header = ["case", "s p50", "peak MiB", "above model", "planned", "limit", "seam", "× joint", "difference"]
    print_table(header, rows)


def report(name: str, results: dict, common: dict, folder: Path, figures, device: torch.device, rows: list) -> None:
    """Append the line of a joint decode, with its peers, and a row of the table for any case."""
    result, size, dtype = results[name], common["size"], common["dtype"]
    case = f"{common['preset']}, {size}³, {name}"
    if "failed" in result:
        rows.append([f"{case}: {result['failed']}", *[""] * 8])
        return
    p20, p50, p80 = np.percentile([1e3 * s for s in result["seconds"]], (20, 50, 80))
    above = result["peak_bytes"] - result["loaded_bytes"]
    planned = limit = ratio = shown = ""
    if name.startswith("joint"):
        rate = figures.flops.get(getattr(torch, dtype), figures.flops[torch.float32])
        share = 1e3 * result["flops"] / rate / p50
        planned, limit = f"{result['planned_bytes'] / 2**20:.0f}", f"{share:.0%}"
        line = {"benchmark": "joint_decode", "case": case, "dtype": dtype}
        line |= {"ms_p50": p50, "ms_p20": p20, "ms_p80": p80, "peak_bytes": result["peak_bytes"] or None}
        line |= {"peak_above_model_bytes": above, "planned_bytes": result["planned_bytes"], "share_of_limit": share}
        line |= {"tflops_per_second": result["flops"] / p50 / 1e9, "seam_score": result.get("seam_score")}
        line["peers"] = {}
        for peer in filter(results.__contains__, _PEERS):
            other = results[peer]
            if "failed" in other:
                line["peers"][peer] = {"not_run": other["failed"]}
                continue
            times = {"ms_p50": 1e3 * float(np.median(other["seconds"])), "peak_bytes": other["peak_bytes"] or None}
            if peer == "disjoint":  # another result, on purpose
                line["peers"][peer] = times | {"seam_score": other.get("seam_score")}
            elif difference(folder, name, peer) < _TOLERANCE[dtype]:
                line["peers"][peer] = times
                line[f"x_{peer}"] = times["ms_p50"] / p50
        append_result(line, device)
    else:
        joint = next(other for other in results if other.startswith("joint"))
        if "failed" not in results[joint]:
            error = difference(folder, name, joint)
            shown = f"{error:.1e}"
            if error < _TOLERANCE[dtype]:
                ratio = f"{p50 / 1e3 / float(np.median(results[joint]['seconds'])):.2f}"
    seam = f"{result['seam_score']:.2f}" if "seam_score" in result else ""
    peaks = [f"{n / 2**20:.0f}" for n in (result["peak_bytes"], above)]
    rows.append([f"{case}, {dtype}", f"{p50 / 1e3:.2f}", *peaks, planned, limit, seam, ratio, shown])


if __name__ == "__main__":
    main()
