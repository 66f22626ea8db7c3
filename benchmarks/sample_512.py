"""Sample a volume from noise, decode it jointly and write it: seconds, voxels per second and peak memory of each stage.

    python benchmarks/sample_512.py                        # 512³ on a GPU; 128³ and few steps without one
    python benchmarks/sample_512.py --peer                 # and the same in plain PyTorch
    python benchmarks/sample_512.py --model DIR --size 256 --steps 50 --out chest.nii.gz

Appends one line to benchmarks/results/<device>.jsonl and writes the NIfTI with a PNG of its middle planes beside it.
With --peer every pipeline runs in a process of its own, from the same noise with the same weights: meddiff, PyTorch at
its best setting (this run's dtype, channels-last, compiled; compiling is not counted, and the codes are searched in
chunks) and as published (float32, eager). Volumes above 256³ the peers decode in the published disjoint tiles, with
seams. Two steps of sampling go first and are not counted, and where something is compiled a decode as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import published
import torch
from common import append_result, device_name, is_out_of_memory, limit_memory, print_table
from torch import Tensor

import meddiff
from meddiff.config import PRESETS
from meddiff.report import save_mid_planes
from meddiff.resources import StageMeter, bytes_of, default_device
from meddiff.sampling import SOLVERS, solver_timesteps
from meddiff.sampling.sampler import NoiseSource
from meddiff.volume import Volume

_ANATOMY = "ct_chest_abdomen"  # of random weights
_PEERS = {"best_setting": "PyTorch, channels-last, compiled", "published": "as published: float32, eager"}
_JOINT_UP_TO = 256  # voxels along each axis; above them the published code decodes tiles of that size
# norm of the difference of the latents over their norm, for a peer to have done the same
_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_MAISI = (
    "MAISI, 512³, 30 steps, A100: 48–51 s in 22.8–45.3 GB (Guo et al. 2024, arXiv:2409.11169, inference table; "
    "as published, not measured here)"
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", choices=sorted(PRESETS), default="8x", help="random weights of this preset")
    source.add_argument("--model", help="model folder or Hugging Face repository, instead of random weights")
    parser.add_argument("--anatomy", help=f"{_ANATOMY} for random weights, by default a model's first")
    parser.add_argument("--size", type=int, help="voxels along each axis (512 on a GPU, else 128)")
    parser.add_argument("--steps", type=int, help="denoising steps (30 on a GPU, else 10)")
    parser.add_argument("--solver", choices=sorted(SOLVERS), default="ddim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, help="such as cuda or cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--budget", type=bytes_of, help="memory for decoding, by default what is free")
    parser.add_argument("--out", type=Path, default=Path("out/sample_512.nii"), help="NIfTI file to write")
    parser.add_argument(
        "--peer", nargs="*", choices=list(_PEERS), metavar="PEER", help=f"compare with {', '.join(_PEERS)}, or one"
    )
    parser.add_argument("--only", choices=["meddiff", *_PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--latent", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer is not None and arguments.solver != "ddim":
        parser.error("--peer: the published pipeline takes few steps by ddim only")
    arguments.device = arguments.device or default_device()
    on_gpu = arguments.device.type == "cuda"
    if arguments.steps is None and arguments.solver != "ddpm":
        arguments.steps = 30 if on_gpu else 10
    if arguments.anatomy is None and not arguments.model:
        arguments.anatomy = _ANATOMY
    if not on_gpu and arguments.size is None and arguments.only is None:
        print("no GPU: sampling 128³ in few steps; --size 512 asks for the full size")
    arguments.size = arguments.size or (512 if on_gpu else 128)
    return arguments


def load(arguments: argparse.Namespace, dtype: torch.dtype | None) -> meddiff.MedDiffusion:
    if arguments.model:
        return meddiff.from_pretrained(arguments.model, arguments.device, dtype)
    return meddiff.untrained(arguments.preset, arguments.seed, arguments.device, dtype)


def run_meddiff(arguments: argparse.Namespace) -> dict:
    """The stages and the record of our pipeline, in this process."""
    start = time.perf_counter()
    model = load(arguments, arguments.dtype and getattr(torch, arguments.dtype))
    model.memory_budget = arguments.budget
    loading = time.perf_counter() - start
    if not model.trained:
        print(f"random weights (preset {arguments.preset}): the volume is noise, its times and memory are real")
    print(f"{device_name(model.device)}, {_name(model.dtype)}, model loaded in {loading:.1f} s\n")

    size = (arguments.size,) * 3
    published = {"eta": 0.0, "timestep_spacing": "linspace", "t_end": 0}
    options = {"solver": arguments.solver, "seed": arguments.seed, **published}
    target = model.target(arguments.anatomy, size)
    if model.device.type == "cuda":
        model.generate(arguments.anatomy, size, **options, steps=arguments.steps)
    else:
        warm = options if arguments.solver != "ddpm" else options | {"solver": "ddim"}
        model.sample(model.latent_size(size), target.class_index, **warm, steps=2)
    volume = model.generate(arguments.anatomy, size, **options, steps=arguments.steps)
    meter = StageMeter(model.device)
    with meter.stage("write"):
        volume.save(arguments.out)
    save_mid_planes(volume, _picture(arguments.out))
    if arguments.latent:  # once more, for the comparison
        torch.save(
            model.sample(model.latent_size(size), target.class_index, **options, steps=arguments.steps).cpu(),
            arguments.latent,
        )
    return {"stages": volume.record["stages"] + meter.to_dicts(), "record": volume.record}


def run_peer(arguments: argparse.Namespace, name: str) -> dict:
    """The stages of plain PyTorch, in this process."""
    device, best = arguments.device, name == "best_setting"
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    model = load(arguments, dtype if best else torch.float32)
    target = model.target(arguments.anatomy, (arguments.size,) * 3)
    schedule, shape, dtype = model.schedule, model.latent_size(target.size), model.dtype
    networks = published.Autoencoder(model.config.autoencoder), published.BiFlowNet(model.config.denoiser)
    for network, ours in zip(networks, (model.autoencoder, model.denoiser)):
        network.load_state_dict(ours.state_dict())
        network.eval().requires_grad_(False).to(device, dtype)
    del model, ours
    autoencoder, denoiser = networks
    autoencoder.codebook.float()  # as ours
    denoiser.time_mlp[0].register_forward_hook(lambda module, inputs, output: output.to(dtype))
    estimate = denoiser
    if best:
        for network in networks:
            network.to(memory_format=torch.channels_last_3d)
        autoencoder.codebook = published.ChunkedCodebook(autoencoder.codebook)
        autoencoder.decoder, estimate = torch.compile(autoencoder.decoder), torch.compile(denoiser)

    def sample(steps: int) -> Tensor:
        noise = torch.empty(1, denoiser.config.channels, *shape)
        NoiseSource(arguments.seed, 1).draw(noise)
        timesteps = solver_timesteps(schedule, "ddim", steps)
        y = torch.tensor([target.class_index], device=device)
        return published.sample_ddim(estimate, schedule, noise.to(device), y, timesteps, dtype, best)

    def decode(latent: Tensor) -> Tensor:
        codes = autoencoder.codebook.embeddings
        z = (latent + 1) / 2 * (codes.max() - codes.min()) + codes.min()
        if arguments.size <= _JOINT_UP_TO:
            return autoencoder.decode(z, quantize=True).float()
        tile = _JOINT_UP_TO // autoencoder.config.downsample
        return autoencoder.decode_sliding(z, quantize=True, tile=tile).float()

    meter = StageMeter(device)
    latent = sample(2)
    if best or device.type == "cuda":
        decode(latent)
    with meter.stage("sample"):
        latent = sample(arguments.steps)
    with meter.stage("decode"):
        tensor = decode(latent).clamp_(-1, 1)
        volume = Volume.from_tensor(tensor, intensity=target.intensity, spacing=target.spacing)
    with meter.stage("write"):
        volume.save(arguments.out)
    torch.save(latent.cpu(), arguments.latent)
    return {"stages": meter.to_dicts()}


def total(stages: list[dict]) -> dict:
    peaks = [stage["peak_bytes"] for stage in stages if stage["peak_bytes"] is not None]
    seconds = sum(stage["seconds"] for stage in stages)
    return {"name": "total", "seconds": seconds, "peak_bytes": max(peaks, default=None)}


def apart(name: str, folder: Path, out: Path) -> dict:
    """A pipeline in a process of its own: what it returned, or {"not_run": why}."""
    result = folder / f"{name}.json"
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--latent", str(folder / f"{name}.pt")]
    done = subprocess.run([*command, "--out", str(out)])
    if not result.exists():
        return {"not_run": f"exit code {done.returncode}"}
    return json.loads(result.read_text())


def only(arguments: argparse.Namespace) -> int:
    """The process of `apart`."""
    try:
        limit_memory(arguments.device)
        with torch.inference_mode():
            ours = arguments.only == "meddiff"
            result = run_meddiff(arguments) if ours else run_peer(arguments, arguments.only)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result = {"not_run": "not enough memory"}
    arguments.latent.with_suffix(".json").write_text(json.dumps(result))
    return 0


def compare(arguments: argparse.Namespace, line: dict, folder: Path) -> list[list[str]]:
    """Run the peers after ours, put them into the line, and return their rows of the table."""
    ours, rows, line["peers"] = torch.load(folder / "meddiff.pt"), [], {}
    for name in arguments.peer or _PEERS:
        peer = apart(name, folder, folder / "peer.nii")
        if "not_run" in peer:
            line["peers"][name] = peer
            rows.append([f"{_PEERS[name]}: {peer['not_run']}", "", "", "", ""])
            continue
        stages = [*peer["stages"], total(peer["stages"])]
        theirs = torch.load(folder / f"{name}.pt")
        difference = ((theirs - ours).norm() / theirs.norm()).item()
        same = difference < _TOLERANCE[line["dtype"]]
        seconds, ratio = stages[-1]["seconds"], 1e3 * stages[-1]["seconds"] / line["ms_p50"]
        peak = stages[-1]["peak_bytes"]
        if same:
            line[f"x_{name}"] = ratio
            line["peers"][name] = {
                "ms_p50": 1e3 * seconds, "peak_bytes": peak, "stages": stages, "latent_difference": difference,
                "disjoint_tiles": arguments.size > _JOINT_UP_TO,
            }  # fmt: skip
        else:
            line["peers"][name] = {"not_run": f"another result: the latent differs by {difference:.1e}"}
        shown = f"{ratio:.2f}" if same else f"not the same: {difference:.1e}"
        rows += table_rows(stages, arguments.size, _PEERS[name], shown)
    return rows


def table_rows(stages: list[dict], size: int, who: str, ratio: str = "") -> list[list[str]]:
    return [
        [
            f"{who}: {stage['name']}",
            f"{stage['seconds']:.2f}",
            f"{size**3 / stage['seconds']:.3g}",
            "unknown" if stage["peak_bytes"] is None else f"{stage['peak_bytes'] / 2**20:,.0f}",
            ratio if stage["name"] == "total" else "",
        ]
        for stage in stages
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _picture(out: Path) -> Path:
    return out.with_name(out.name.split(".")[0] + ".png")


def main() -> int:
    arguments = parse_arguments()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.only:
        return only(arguments)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        result = run_meddiff(arguments) if arguments.peer is None else apart("meddiff", folder, arguments.out)
        if "not_run" in result:
            raise ValueError(f"meddiff: {result['not_run']}")
        stages, record = [*result["stages"], total(result["stages"])], result["record"]
        source = "trained model" if arguments.model else arguments.preset
        how = f"{record['solver']} {record['steps']} steps"
        if arguments.budget is not None:
            how += f", {arguments.budget / 1e9:g} GB for decoding"
        line = {
            "benchmark": "sample_512",
            "case": f"sample, decode and write, {source}, {arguments.size}³, {how}",
            "ms_p50": 1e3 * stages[-1]["seconds"],
            "peak_bytes": stages[-1]["peak_bytes"],
            "stages": stages,
        } | {key: record[key] for key in ("solver", "steps", "eta", "seed", "dtype", "model")}
        rows = table_rows(stages, arguments.size, "meddiff")
        if arguments.peer is not None:
            rows += compare(arguments, line, folder)
    print_table(["stage", "seconds", "voxels/s", "peak MiB", "× meddiff"], rows)
    if arguments.device.type == "cuda":
        print(_MAISI)
    results = append_result(line, arguments.device)
    print(f"\nwrote {arguments.out}, {_picture(arguments.out)} and a line of {os.path.relpath(results)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, MemoryError, FloatingPointError) as error:
        sys.exit(f"sample_512: {error}")
