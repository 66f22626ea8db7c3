"""Nearest code for the tokens of a volume, against PyTorch's own ways and faiss where it is installed.

python benchmarks/bench_vq_nearest.py --tokens 64 --codes 8192
"""

from __future__ import annotations

import argparse

import torch
from common import append_result, measure, print_table

from meddiff.kernels.vq_nearest import vq_nearest
from meddiff.resources import default_device

_CHUNK = 4096  # tokens per product of the peers, so that the distance matrix stays at 128 MiB


def _chunked(tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """argmin of |c|²/2 - z·c by matrix products."""
    half = codes.square().sum(1) / 2
    return torch.cat([torch.addmm(half, part, codes.T, alpha=-1).argmin(1) for part in tokens.split(_CHUNK)])


def _cdist(tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.cdist(part, codes).argmin(1) for part in tokens.split(_CHUNK)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="latent elements along each axis")
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--channels", type=int, default=8)
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
    print(case)
    print_table(["", "ms p50", "peak MiB", "× meddiff", "other indices"], rows)


if __name__ == "__main__":
    main()
