"""What a ControlNet adds to one step of BiFlowNet, random weights: the steered estimate against the base's alone.

python benchmarks/bench_controlnet.py --size 32 --dtype bfloat16

The condition is encoded once per volume and not in a step, so that it has a line of its own.
"""

from __future__ import annotations

import argparse

import torch
from common import append_result, measure, print_table

from meddiff.config import PRESETS, ControlNetConfig
from meddiff.models import BiFlowNet, Control, ControlNet
from meddiff.resources import default_device, default_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="8x")
    parser.add_argument("--size", type=int, default=32, help="latent elements along each axis, a multiple of 8")
    parser.add_argument("--encoder", choices=("latent", "convolutional"), default="latent", help="of the condition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    device, size = arguments.device, arguments.size
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype(device)
    name = str(dtype).removeprefix("torch.")

    torch.manual_seed(0)
    preset = PRESETS[arguments.preset]
    factor, latent = preset.autoencoder.downsample, arguments.encoder == "latent"
    config = ControlNetConfig(
        denoiser=preset.denoiser,
        encoder=arguments.encoder,
        channels=preset.denoiser.channels if latent else 4,
        widths=tuple(16 * 2**level for level in range(preset.autoencoder.levels)),
    )
    base = BiFlowNet(preset.denoiser).eval().requires_grad_(False).to(device)
    network = ControlNet.from_denoiser(base, config).eval().requires_grad_(False).to(dtype)
    base.to(dtype)
    x = torch.randn(1, preset.denoiser.channels, size, size, size, device=device)
    t, y = torch.tensor([500], device=device), torch.tensor([1], device=device)
    resolution = torch.full((1, 3), size / 64, device=device)
    voxels = size if latent else factor * size
    condition = torch.randn(1, config.channels, voxels, voxels, voxels, device=device)

    with torch.inference_mode():
        control = Control(network, condition)
        if not torch.equal(base(x, t, y, resolution, control), base(x, t, y, resolution)):
            raise SystemExit("all ways out are zero, and the steered estimate differs from the base's: not measured")
        figures = {
            "base": measure(lambda: base(x, t, y, resolution), device, arguments.repeats),
            "steered": measure(lambda: base(x, t, y, resolution, control), device, arguments.repeats),
            "condition, once": measure(lambda: network.encode(condition), device, arguments.repeats),
        }
    case = f"BiFlowNet with a ControlNet, one step, {arguments.preset}, latent {size}³"
    cost = figures["steered"]["ms_p50"] / figures["base"]["ms_p50"]
    line = {"benchmark": "controlnet", "case": case, "dtype": name, "times_the_base": cost}
    line |= {"encoder": arguments.encoder, "encode_ms_p50": figures["condition, once"]["ms_p50"]}
    append_result(line | figures["steered"], device)
    print(f"{case}, {name}: {cost:.2f} times the base")
    rows = []
    for title, times in figures.items():
        peak = "–" if times["peak_bytes"] is None else f"{times['peak_bytes'] / 2**20:.0f}"
        rows.append([title, f"{times['ms_p50']:.1f}", peak])
    print_table(["", "ms p50", "peak MiB"], rows)


if __name__ == "__main__":
    main()
