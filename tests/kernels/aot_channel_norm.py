"""Cases of ahead-of-time compilation: the widths of the U-Net's attention levels, and the widest."""

from __future__ import annotations

from meddiff.kernels.channel_norm import _bwd_kernel, _configuration, _fwd_kernel


def _case(kernel, name: str, dtype: str, channels: int) -> dict:
    constexprs = _configuration(channels)
    num_warps = constexprs.pop("num_warps")
    others = {"partial": "*fp32", "R": "i32", "share": "i32", "eps": "fp32"} | dict.fromkeys(constexprs, "constexpr")
    return {
        "name": f"channel_norm {name} {dtype}, {channels} channels",
        "kernel": kernel,
        "signature": {argument: others.get(argument, f"*{dtype}") for argument in kernel.arg_names},
        "constexprs": constexprs,
        "num_warps": num_warps,
        "tensor_core": False,
    }


CASES = [
    _case(kernel, name, dtype, channels)
    for name, kernel in (("forward", _fwd_kernel), ("backward", _bwd_kernel))
    for dtype, channels in (("bf16", 288), ("bf16", 576), ("fp32", 576), ("fp16", 72), ("fp32", 4096))
]
