"""Other projects' networks, random weights, plain and accelerated: the published 3D MedDiffusion autoencoder and
BiFlowNet, MONAI's MAISI autoencoder without splits, MONAI's and vector-quantize-pytorch's quantisers.

python benchmarks/bench_backend.py --size 128 --tokens 32768
python benchmarks/bench_backend.py --only published --bfloat16 --small-pages
python benchmarks/bench_backend.py --only maisi --size 160 --budget 1.1GB --bfloat16 --repeats 1 --cold
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence

import published
import torch
from common import append_result, is_out_of_memory, limit_memory, measure, print_table
from torch import Tensor, nn

import meddiff
from meddiff.config import PRESETS
from meddiff.resources import bytes_of

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # norm of the difference over the norm
_TIES = 1e-4  # share of the tokens whose nearest code rounding may decide

Case = tuple[str, nn.Module, Callable[[nn.Module], Tensor]]


def _networks(preset: str, size: int, limit: str) -> Iterator[Case]:
    config, generator = PRESETS[preset], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    autoencoder = published.Autoencoder(config.autoencoder)
    n = size // config.autoencoder.downsample
    patch = min(size, config.autoencoder.patch_size)
    volume = torch.rand(1, 1, size, size, size, generator=generator) * 2 - 1
    latent = torch.randn(1, config.autoencoder.embedding_dim, n, n, n, generator=generator)
    indices = torch.randint(config.autoencoder.n_codes, (1, n, n, n), generator=generator)
    yield f"patch_encode, {size}³", autoencoder, lambda m: m.patch_encode(volume.to(_dtype(m)), False, patch)
    yield f"decode, {size}³{limit}", autoencoder, lambda m: m.decode(indices)
    yield f"codebook, {n}³ tokens", autoencoder, lambda m: m.codebook(latent.to(_dtype(m)))["encodings"]
    time, y, n = torch.tensor([500]), torch.tensor([1]), max(n, config.denoiser.sub_volume)
    x = torch.randn(1, config.denoiser.channels, n, n, n, generator=generator)

    def estimate(m: nn.Module) -> Tensor:
        return m(x.to(_dtype(m)), time, y=y, res=torch.full((1, 3), n / 64, dtype=_dtype(m)))

    yield f"BiFlowNet, {n}³", published.BiFlowNet(config.denoiser), estimate


def _maisi(size: int, limit: str) -> Iterator[Case]:
    """With the published configuration, which halves every axis twice."""
    try:
        from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    except ImportError:
        print("monai is not installed: left out (pip install monai)")
        return
    torch.manual_seed(0)
    blocks = {"num_channels": [64, 128, 256], "num_res_blocks": [2, 2, 2], "attention_levels": [False] * 3}
    model = AutoencoderKlMaisi(3, 1, 1, latent_channels=4, norm_num_groups=32, num_splits=1, **blocks)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, *[size // 4] * 3, generator=generator)
    volume = torch.rand(1, 1, size, size, size, generator=generator)
    yield f"MAISI decode, {size}³{limit}", model, lambda m: m.decode(z.to(_dtype(m)))
    yield f"MAISI encode, {size}³{limit}", model, lambda m: m.encode(volume.to(_dtype(m)))[0]


def _quantisers(tokens: int, codes: int, dim: int) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, tokens, dim, generator=generator)
    case = f"{tokens} tokens, {codes} codes of {dim}"
    try:
        from monai.networks.layers.vector_quantizer import EMAQuantizer
    except ImportError:
        print("monai is not installed: left out (pip install monai)")
    else:
        z = rows.mT.reshape(1, dim, 1, 1, tokens)
        yield f"MONAI EMAQuantizer, {case}", EMAQuantizer(3, codes, dim), lambda m: m(z)[2]
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        print("vector-quantize-pytorch is not installed: left out (pip install vector-quantize-pytorch)")
        return
    for name, cosine in (("Euclidean", False), ("cosine", True)):
        module = VectorQuantize(dim=dim, codebook_size=codes, use_cosine_sim=cosine)
        if not cosine:  # new ones are so short that rounding decides between many
            module.codebook = torch.randn(codes, dim, generator=generator)
        yield f"VectorQuantize, {name}, {case}", module, lambda m: m(rows)[1]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _same(got: Tensor, wanted: Tensor) -> bool:
    if not wanted.is_floating_point():
        return (got != wanted).float().mean().item() < _TIES
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    return error.item() < max(_TOLERANCE[got.dtype], _TOLERANCE[wanted.dtype])


def _bench(
    case: str,
    module: nn.Module,
    work: Callable,
    dtypes: Sequence[torch.dtype],
    repeats: int,
    budget: int | None,
    warm_up: bool = True,
) -> list[list[str]]:
    """Rows of the table: the module in each dtype, plain and accelerated. float32 comes first, and is the reference."""
    device, rows, peers = torch.device("cpu"), [], {}
    got = wanted = None
    weights = {key: tensor.clone() for key, tensor in module.eval().state_dict().items()}

    def run() -> None:
        nonlocal got
        got = None
        got = work(module)

    def with_weights(dtype: torch.dtype) -> nn.Module:
        """The module; a dtype after another one rounds the weights only once."""
        module.float().load_state_dict(weights)
        return module.to(dtype)

    for dtype in dtypes:
        if wanted is not None and not wanted.is_floating_point():
            break  # indices of rounded latents are others
        name = str(dtype).removeprefix("torch.")
        ways = {"plain": dtype} if dtype == torch.float32 else {f"plain_{name}": dtype, "autocast": torch.float32}
        for peer, stored in ways.items():  # not all are made for another dtype, which autocast then is for
            if peer == "autocast" and "ms_p50" in peers[f"plain_{name}"]:
                continue
            meddiff.restore(with_weights(stored))
            try:
                with torch.autocast("cpu", dtype, enabled=peer == "autocast"):
                    figures = measure(run, device, repeats, warm_up)
                wanted = got if wanted is None else wanted
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) and dtype == torch.float32:
                    raise
                why = "not enough memory" if is_out_of_memory(error) else str(error).partition("\n")[0]
                peers[peer] = {"not_run": why}
                rows.append([f"{case}, {peer}: {why}", name, *[""] * 5])
            else:
                same = _same(got, wanted)
                peers[peer] = figures if same else {"not_run": "another result"}
                rows.append([f"{case}, {peer}", name, *_cells(figures), "" if same else "not the same"])
        meddiff.accelerate(with_weights(torch.float32), budget)  # some have no other dtype
        with_weights(dtype)
        figures = measure(run, device, repeats, warm_up)
        line = {"benchmark": "backend", "case": case, "dtype": name} | figures
        same = wanted is None or _same(got, wanted)
        if same:
            ratios = {p: f["ms_p50"] / figures["ms_p50"] for p, f in peers.items() if "ms_p50" in f}
            line |= {f"x_{p}": ratio for p, ratio in ratios.items()} | {"peers": dict(peers)}
        append_result(line, device)
        shown = ", ".join(f"{ratio:.1f} {p}" for p, ratio in ratios.items()) if same else "not the same"
        rows.append([case, name, *_cells(figures), shown])
    meddiff.restore(with_weights(torch.float32))
    return rows


def _cells(figures: dict) -> list[str]:
    peaks = (figures[f"peak_{name}bytes"] for name in ("", "above_model_", "above_warm_"))
    return [f"{figures['ms_p50']:.1f}", *("unknown" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="8x")
    parser.add_argument("--only", choices=("published", "maisi", "quantisers"), help="by default all of them")
    parser.add_argument("--case", default="", help="only cases that begin with this, such as 'MAISI encode'")
    parser.add_argument("--size", type=int, default=128, help="voxels along each axis")
    parser.add_argument("--budget", type=bytes_of, help="for decoding, and MAISI's encoding; such as 1.1GB")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=8, help="channels of a code")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="do not run once before, for what takes minutes")
    parser.add_argument("--bfloat16", action="store_true", help="run networks in bfloat16 as well")
    parser.add_argument("--small-pages", action="store_true", help="do not ask for huge ones, as most projects do not")
    arguments = parser.parse_args()
    if arguments.small_pages:
        os.environ["THP_MEM_ALLOC_ENABLE"] = "0"  # read by the first allocation
    dtypes = [torch.float32, torch.bfloat16] if arguments.bfloat16 else [torch.float32]
    budget, rows = arguments.budget, []
    limit = "" if budget is None else f", {budget / 1e9:g} GB"
    limit_memory(torch.device("cpu"))

    def wanted(name: str) -> bool:
        return arguments.only in (None, name)

    def bench(cases: Iterator[Case], *settings) -> None:
        for case in cases:
            if case[0].startswith(arguments.case):
                rows.extend(_bench(*case, *settings))

    with torch.inference_mode():
        settings = (dtypes, arguments.repeats, budget, not arguments.cold)
        if wanted("published"):
            bench(_networks(arguments.preset, arguments.size, limit), *settings)
        if wanted("maisi"):
            bench(_maisi(arguments.size, limit), *settings)
        if wanted("quantisers"):
            bench(_quantisers(arguments.tokens, arguments.codes, arguments.dim), dtypes[:1], arguments.repeats, None)
    print_table(["case", "dtype", "ms p50", "peak MiB", "above model", "above warm", "× peers"], rows)


if __name__ == "__main__":
    main()
