"""Attention inside the windows of a volume, forward and backward, against SDPA after rearranging into windows,
FlexAttention and xformers.

python benchmarks/bench_window_attention.py --tokens 64 32 --windows 8 4

Windows of 8³ tokens are those of token patch 1 (8x), windows of 4³ those of token patch 2 (4x). One qkv tensor goes in
and one tensor comes out, so a peer's time holds its way into windows and back.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import append_result, measure, print_table
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from meddiff.kernels.window_attention import window_attention
from meddiff.resources import default_device, default_dtype

# largest difference of a component over the largest component, for results to count as the same
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor's exponential unit, compute capability 8.0 to 10.0
_VOLUME = "b (d i) (h j) (w k) (n c)"


def _in_windows(attend: Callable, layout: str) -> Callable:
    """`attend(q, k, v)`, of windows in `layout`, as a function like window_attention."""

    def attention(qkv: Tensor, heads: int, window: int) -> Tensor:
        sizes = dict(zip("dhw", (length // window for length in qkv.shape[1:4])), n=heads, i=window, j=window, k=window)
        q, k, v = (rearrange(part, f"{_VOLUME} -> {layout}", **sizes) for part in qkv.chunk(3, dim=4))
        return rearrange(attend(q, k, v), f"{layout} -> {_VOLUME}", **sizes)

    return attention


def find_peers(device: torch.device) -> dict[str, Callable]:
    heads_first = "(b d h w) n (i j k) c"
    sdpa = _in_windows(F.scaled_dot_product_attention, heads_first)
    found = {
        "SDPA": sdpa,
        "SDPA, compiled": torch.compile(sdpa, dynamic=False),
        "FlexAttention, compiled": _in_windows(torch.compile(flex_attention, dynamic=False), heads_first),
    }
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        print("xformers is not installed: left out (pip install xformers)")
    else:
        if device.type == "cuda":
            found["xformers"] = _in_windows(memory_efficient_attention, "(b d h w) (i j k) n c")
    return found


def prepare(attention: Callable, qkv: Tensor, heads: int, window: int, backward: bool) -> Callable[[], Tensor]:
    """The work that is timed: the output, or the gradient of qkv with the forward pass behind it."""
    if not backward:
        return lambda: attention(qkv, heads, window)
    leaf = qkv.detach().requires_grad_()
    out = attention(leaf, heads, window)
    return lambda: torch.autograd.grad(out, leaf, out.detach(), retain_graph=True)[0]


def exponential_limit(device: torch.device) -> float | None:
    """Exponentials per second of a GPU at its highest clock."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return _EXPONENTIALS_PER_CLOCK * properties.multi_processor_count * 1e3 * properties.clock_rate


def bench(tokens: int, window: int, backward: bool, peers: dict[str, Callable], arguments: argparse.Namespace) -> None:
    device, dtype, heads = arguments.device, getattr(torch, arguments.dtype), arguments.heads
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, *[tokens] * 3, 3 * heads * arguments.head_dim, generator=generator).to(device, dtype)
    direction = "backward" if backward else "forward"
    case = (
        f"window attention, {direction}, {tokens}³ tokens, windows of {window}³, {heads} heads of {arguments.head_dim}"
    )
    work = prepare(window_attention, qkv, heads, window, backward)
    wanted = work()
    figures = measure(work, device, arguments.repeats)
    scores = heads * tokens**3 * window**3
    # two products of a forward pass, five of a backward pass
    operations = (10 if backward else 4) * scores * arguments.head_dim
    line = {"benchmark": "window_attention", "case": case, "dtype": arguments.dtype} | figures
    line["tflops"] = 1e-9 * operations / figures["ms_p50"]
    if limit := exponential_limit(device):  # each score once, though the backward pass takes two
        line["exponential_limit_share"] = 1e3 * scores / figures["ms_p50"] / limit

    def row(name: str, figures: dict, ratio: str, difference: str) -> list[str]:
        return [name, f"{figures['ms_p50']:.2f}", f"{figures['peak_bytes'] / 2**20:.0f}", ratio, difference]

    rows = [row("meddiff", figures, "", "")]
    torch.compiler.reset()  # of the shapes before, of which it keeps only a few
    for name, peer in peers.items():
        try:
            peer_work = prepare(peer, qkv, heads, window, backward)
            difference = ((peer_work() - wanted).abs().max() / wanted.abs().max()).item()
            other = measure(peer_work, device, arguments.repeats)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            print(f"{name} refused: {reason[:200]}")
            rows.append([name, "refused", "", "", ""])
            continue
        ratio = other["ms_p50"] / figures["ms_p50"]
        same = difference <= _TOLERANCE[dtype]
        if same:
            line[f"x_{name.replace(', ', '_').lower()}"] = ratio
        rows.append(row(name, other, f"{ratio:.1f}" if same else "not comparable", f"{difference:.1e}"))
    append_result(line, device)
    share = f", {line['exponential_limit_share']:.0%} of the exponential unit's limit" if limit else ""
    print(f"{case}, {arguments.dtype}: {line['tflops']:.3f} TFLOP/s{share}")
    print_table(["", "ms p50", "peak MiB", "× meddiff", "difference"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 32], help="along each axis of the volume")
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 4], help="tokens along each axis of a window")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--no-peers", action="store_true", help="this operator alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or str(default_dtype(arguments.device)).removeprefix("torch.")
    peers = {} if arguments.no_peers else find_peers(arguments.device)
    for tokens in arguments.tokens:
        for window in arguments.windows:
            for backward in (False, True):
                bench(tokens, window, backward, peers, arguments)


if __name__ == "__main__":
    main()
