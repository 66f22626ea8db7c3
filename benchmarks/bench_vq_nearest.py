"""Nearest code for the tokens of a volume, against PyTorch's own ways, and faiss and flash-kmeans where installed; and
fused with what is before and behind it, against the same operations one by one.

python benchmarks/bench_vq_nearest.py --tokens 64 --codes 8192
"""

from __future__ import annotations

import argparse
import inspect

import torch
import torch.nn.functional as F
from common import append_result, measure, print_table

from meddiff.kernels.patchify import patchify, stitch
from meddiff.kernels.vq_fused import vq_decode, vq_encode
from meddiff.kernels.vq_nearest import vq_nearest
from meddiff.resources import default_device

_CHUNK = 4096  # tokens per product of the peers, so that the distance matrix stays at 128 MiB


def _chunked(tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """argmin of |c|²/2 - z·c by matrix products."""
    half = codes.square().sum(1) / 2
    return torch.cat([torch.addmm(half, part, codes.T, alpha=-1).argmin(1) for part in tokens.split(_CHUNK)])


def _cdist(tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.cdist(part, codes).argmin(1) for part in tokens.split(_CHUNK)])


def _bench_fused(z: torch.Tensor, codes: torch.Tensor, q: int, repeats: int) -> list[list[str]]:
    """Both fused operators, and the same without them; z is contiguous [1, C, n, n, n], n a multiple of q."""
    device, channels, size = z.device, z.shape[1], z.shape[2:]
    weight = torch.eye(channels, device=device) + 0.1
    bias = torch.full((channels,), 0.01, device=device)
    features, table = patchify(z, q), (codes @ weight.T + bias).bfloat16()
    kernel = weight.view(channels, channels, 1, 1, 1)

    def encode_unfused() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        latent = stitch(F.conv3d(features, kernel, bias), size)
        index = vq_nearest(latent, codes)
        return latent, index, F.embedding(index, codes).movedim(4, 1)

    def decode_unfused() -> tuple[torch.Tensor, torch.Tensor]:
        index = vq_nearest((z + 1) * 2.5 - 2.5, codes)
        rows = F.embedding(index, codes).movedim(4, 1).bfloat16()
        return index, F.conv3d(rows, kernel.bfloat16(), bias.bfloat16())

    forms = {
        "encode": (lambda: vq_encode(features, weight, bias, codes, size, rows=True), encode_unfused, 1),
        "decode": (lambda: vq_decode(z, codes, table, (-2.5, 2.5)), decode_unfused, 0),
    }
    rows = []
    for name, (fused, unfused, index) in forms.items():
        figures, other = measure(fused, device, repeats), measure(unfused, device, repeats)
        different = (fused()[index] != unfused()[index]).float().mean().item()
        case = f"nearest code fused, {name}, {size[0]}³ tokens, {len(codes)} codes of {channels}"
        line = {"benchmark": "vq_fused", "case": case, "dtype": "float32"} | figures
        ratio = other["ms_p50"] / figures["ms_p50"]
        if different < 1e-4:
            line["x_unfused"] = ratio
        append_result(line, device)
        for way, figure, times in ((name, figures, ""), (f"{name}, unfused", other, f"{ratio:.2f}")):
            peak = "unknown" if figure["peak_bytes"] is None else f"{figure['peak_bytes'] / 2**20:.0f}"
            rows.append([way, f"{figure['ms_p50']:.1f}", peak, times, f"{different:.1e}" if times else ""])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="latent elements along each axis")
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--patch", type=int, default=8, help="latent elements of a patch along each axis")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    device = arguments.device

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, arguments.channels, *[arguments.tokens] * 3, generator=generator).to(device)
    codes = torch.randn(arguments.codes, arguments.channels, generator=generator).to(device)
    tokens = z.movedim(1, -1).reshape(-1, arguments.channels).contiguous()
    peers = {"chunked product": lambda: _chunked(tokens, codes), "cdist": lambda: _cdist(tokens, codes)}
    try:
        import faiss
    except ImportError:
        print("faiss is not installed: left out (pip install faiss-cpu)")
    else:
        index = faiss.IndexFlatL2(arguments.channels)
        index.add(codes.cpu().numpy())
        on_host = tokens.cpu().numpy()
        peers["faiss"] = lambda: torch.from_numpy(index.search(on_host, 1)[1][:, 0])

    if device.type == "cuda":
        try:
            from flash_kmeans.assign_euclid_triton import euclid_assign_triton
        except ImportError:
            print("flash-kmeans is not installed: left out (pip install flash-kmeans)")
        else:
            # older versions are given the squares of the tokens
            wants_squares = "x_sq" in inspect.signature(euclid_assign_triton).parameters
            given = {"x_sq": tokens.square().sum(1)[None]} if wants_squares else {}
            peers["flash-kmeans"] = lambda: euclid_assign_triton(tokens[None], codes[None], **given)[0].long()

    wanted = vq_nearest(z, codes).flatten()
    figures = measure(lambda: vq_nearest(z, codes), device, arguments.repeats)
    pairs = tokens.shape[0] * codes.shape[0]
    case = f"nearest code, {arguments.tokens}³ tokens, {arguments.codes} codes of {arguments.channels}"
    line = {"benchmark": "vq_nearest", "case": case, "dtype": "float32"} | figures
    line["pairs_per_second"] = 1e3 * pairs / figures["ms_p50"]
    rows = [["meddiff", f"{figures['ms_p50']:.1f}", f"{figures['peak_bytes'] / 2**20:.0f}", "", ""]]
    for name, peer in peers.items():
        other = measure(peer, device, min(3, arguments.repeats))
        ratio = other["ms_p50"] / figures["ms_p50"]
        # peers round their distances, so near ties may fall otherwise; more than that, and nothing is compared
        different = (peer().to(wanted.device) != wanted).float().mean().item()
        if different < 1e-4:
            line[f"x_{name.replace(' ', '_')}"] = ratio
        shown = f"{ratio:.1f}" if different < 1e-4 else "not comparable"
        rows.append([name, f"{other['ms_p50']:.1f}", f"{other['peak_bytes'] / 2**20:.0f}", shown, f"{different:.1e}"])
    append_result(line, device)
    rows += _bench_fused(z, codes, arguments.patch, arguments.repeats)
    print(case)
    print_table(["", "ms p50", "peak MiB", "× meddiff", "other indices"], rows)


if __name__ == "__main__":
    main()
