"""One step of BiFlowNet, random weights, against the same network in plain PyTorch: as published (float32, contiguous)
and at its best setting (this run's dtype, channels-last, compiled).

python benchmarks/bench_biflownet_step.py --size 32 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from common import append_result, measure, print_table
from einops import rearrange
from torch import Tensor

from meddiff.config import PRESETS, DenoiserConfig
from meddiff.models import BiFlowNet
from meddiff.resources import default_device, default_dtype

# norm of the difference over the norm, for outputs to count as the same
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class PlainBiFlowNet:
    """BiFlowNet of PyTorch's operators alone, with windows rearranged in memory, from a state dict."""

    def __init__(self, config: DenoiserConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    def _linear(self, key: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{key}.weight"], self.weights.get(f"{key}.bias"))

    def _conv(self, key: str, x: Tensor, **options: int) -> Tensor:
        return F.conv3d(x, self.weights[f"{key}.weight"], self.weights[f"{key}.bias"], **options)

    def _block(self, key: str, x: Tensor, scale_shift: tuple[Tensor, ...] | None = None) -> Tensor:
        x = self._conv(f"{key}.proj", x, padding=1)
        x = F.group_norm(
            x, self.config.num_groups, self.weights[f"{key}.norm.weight"], self.weights[f"{key}.norm.bias"]
        )
        if scale_shift:
            scale, shift = (v[:, :, None, None, None] for v in scale_shift)
            x = x * (scale + 1) + shift
        return F.silu(x)

    def _resnet(self, key: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
        scale_shift = None if condition is None else self._linear(f"{key}.mlp.1", F.silu(condition)).chunk(2, dim=1)
        h = self._block(f"{key}.block2", self._block(f"{key}.block1", x, scale_shift))
        return h + (self._conv(f"{key}.res_conv", x) if f"{key}.res_conv.weight" in self.weights else x)

    def _attention(self, key: str, x: Tensor) -> Tensor:
        if f"{key}.fn.norm.gamma" not in self.weights:
            return x
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        h = (x - mean) / (variance + 1e-5).sqrt() * self.weights[f"{key}.fn.norm.gamma"]
        qkv = self._linear(f"{key}.fn.fn.to_qkv", h.flatten(2).mT)
        q, k, v = rearrange(qkv, "b n (three heads c) -> three b heads n c", three=3, heads=8)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b (heads c) n")
        return x + self._conv(f"{key}.fn.fn.to_out", h.unflatten(2, x.shape[2:]))

    @staticmethod
    def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def _dit(self, key: str, x: Tensor, condition: Tensor, skip: Tensor | None = None) -> Tensor:
        """x: [B·windows, tokens, C], condition: one per window."""
        if skip is not None:
            x = self._linear(f"{key}.skip_linear", torch.cat([x, skip], dim=2))
        modulation = self._linear(f"{key}.adaLN_modulation.1", F.silu(condition))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, dim=1)
        qkv = self._linear(f"{key}.attn.qkv", self._modulate(x, shift, scale))
        q, k, v = rearrange(qkv, "b n (three heads c) -> three b heads n c", three=3, heads=self.config.num_heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b n (heads c)")
        x = x + gate[:, None] * self._linear(f"{key}.attn.proj", h)
        h = F.gelu(self._linear(f"{key}.mlp.fc1", self._modulate(x, mlp_shift, mlp_scale)), approximate="tanh")
        return x + mlp_gate[:, None] * self._linear(f"{key}.mlp.fc2", h)

    def _intra_patch_flow(self, x: Tensor, condition: Tensor) -> list[Tensor]:
        p, n = self.config.token_patch, self.config.sub_volume // self.config.token_patch
        grid = dict(zip("dhw", (size // self.config.sub_volume for size in x.shape[2:])))
        x = self._conv("x_embedder.proj", x, stride=p)
        x = rearrange(x, "b c (d i) (h j) (w k) -> (b d h w) (i j k) c", i=n, j=n, k=n) + self.weights["pos_embed"]
        condition = condition.repeat_interleave(math.prod(grid.values()), dim=0)
        features, skips = [], []

        def feature(key: str) -> None:
            shift, scale = self._linear(f"{key}.adaLN_modulation.1", F.silu(condition)).chunk(2, dim=1)
            rows = self._linear(f"{key}.linear", self._modulate(x, shift, scale))
            windows = "(b d h w) (i j k) (pd ph pw c) -> b c (d i pd) (h j ph) (w k pw)"
            features.append(rearrange(rows, windows, **grid, i=n, j=n, k=n, pd=p, ph=p, pw=p))

        for i in range(2):
            x = self._dit(f"IntraPatchFlow_input.{i}.0", x, condition)
            skips.append(x)
            feature(f"IntraPatchFlow_input.{i}.1")
        for i in range(self.config.mid_blocks):
            x = self._dit(f"IntraPatchFlow_mid.{i}", x, condition)
        for i in range(2):
            x = self._dit(f"IntraPatchFlow_output.{i}.0", x, condition, skips.pop())
            feature(f"IntraPatchFlow_output.{i}.1")
        return features

    def _condition(self, t: Tensor, y: Tensor, resolution: Tensor) -> Tensor:
        half = self.config.dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(steps * (-math.log(10000) / (half - 1)))
        time = torch.cat([angles.sin(), angles.cos()], dim=1).to(resolution.dtype)
        time = self._linear("time_mlp.3", F.gelu(self._linear("time_mlp.1", time)))
        place = self._linear("res_mlp.2", F.silu(self._linear("res_mlp.0", resolution)))
        return torch.cat([time + self.weights["cond_emb.weight"][y], place], dim=1)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, resolution: Tensor) -> Tensor:
        condition, levels = self._condition(t, y, resolution), len(self.config.dim_mults)
        features = self._intra_patch_flow(x, condition)
        x = first = self._conv("init_conv", x, padding=1)
        skips = []
        for i in range(levels):
            x = x + features[i] if i < 2 else x
            for layer in (0, 2):
                x = self._resnet(f"downs.{i}.{layer}", x, condition)
                x = self._attention(f"downs.{i}.{layer + 1}", x)
                skips.append(x)
            if 1 <= i < levels - 1:
                x = self._conv(f"downs.{i}.4", x, stride=2, padding=1)
        x = self._attention("mid_spatial_attn", self._resnet("mid_block1", x, condition))
        x = self._resnet("mid_block2", x, condition)
        for j in range(levels):
            x = x + features[j - levels + 4] if j >= levels - 2 else x
            for layer in (0, 2):
                x = self._resnet(f"ups.{j}.{layer}", torch.cat([x, skips.pop()], dim=1), condition)
                x = self._attention(f"ups.{j}.{layer + 1}", x)
            if j < levels - 2:
                up = f"ups.{j}.4"
                x = F.conv_transpose3d(x, self.weights[f"{up}.weight"], self.weights[f"{up}.bias"], stride=2, padding=1)
        return self._conv("final_conv.1", self._resnet("final_conv.0", torch.cat([x, first], dim=1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="8x")
    parser.add_argument("--size", type=int, default=32, help="latent elements along each axis, a multiple of 8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--no-compile", action="store_true", help="the best setting of the peer without torch.compile")
    arguments = parser.parse_args()
    device, size = arguments.device, arguments.size
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype(device)
    name = str(dtype).removeprefix("torch.")

    torch.manual_seed(0)
    config = PRESETS[arguments.preset].denoiser
    network = BiFlowNet(config).eval().to(device)
    x = torch.randn(1, config.channels, size, size, size, device=device)
    t, y = torch.tensor([500], device=device), torch.tensor([1], device=device)
    resolution = torch.full((1, 3), size / 64, device=device)
    weights = network.state_dict()
    published = PlainBiFlowNet(config, {key: weight.contiguous() for key, weight in weights.items()})
    channels_last = {
        key: weight.to(dtype, memory_format=torch.channels_last_3d if weight.ndim == 5 else torch.preserve_format)
        for key, weight in weights.items()
    }
    best = PlainBiFlowNet(config, channels_last)
    run = best.__call__ if arguments.no_compile else torch.compile(best.__call__)
    inputs = (x.to(dtype, memory_format=torch.channels_last_3d), t, y, resolution.to(dtype))
    setting = f"best setting: {name}, channels-last" + (", not compiled" if arguments.no_compile else ", compiled")
    peers = {
        "as published: float32, contiguous": lambda: published(x, t, y, resolution),
        setting: lambda: run(*inputs),
    }

    with torch.inference_mode():
        wanted = published(x, t, y, resolution).double()
        network.to(dtype)
        difference = ((network(x, t, y, resolution) - wanted).norm() / wanted.norm()).item()
        figures = measure(lambda: network(x, t, y, resolution), device, arguments.repeats)
        case = f"BiFlowNet, one step, {arguments.preset}, latent {size}³"
        line = {"benchmark": "biflownet_step", "case": case, "dtype": name, "difference": difference} | figures
        same = difference <= _TOLERANCE[dtype]

        def row(name: str, figures: dict, ratio: str, difference: float) -> list[str]:
            peak = f"{figures['peak_bytes'] / 2**20:.0f}"
            return [name, f"{figures['ms_p50']:.1f}", peak, ratio, f"{difference:.1e}"]

        rows = [row("meddiff", figures, "", difference)]
        line["peers"] = {}
        for key, (title, peer) in zip(("published", "best_setting"), peers.items()):
            other = measure(peer, device, min(3, arguments.repeats))
            off = ((peer() - wanted).norm() / wanted.norm()).item()
            ratio = other["ms_p50"] / figures["ms_p50"]
            comparable = same and off <= _TOLERANCE[dtype]
            if comparable and not (key == "best_setting" and arguments.no_compile):
                line[f"x_{key}"] = ratio
                line["peers"][key] = other
            rows.append(row(title, other, f"{ratio:.1f}" if comparable else "not comparable", off))
    append_result(line, device)
    print(f"{case}, {name}")
    print_table(["", "ms p50", "peak MiB", "× meddiff", "difference from float32"], rows)


if __name__ == "__main__":
    main()
