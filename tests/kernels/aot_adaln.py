"""Cases of ahead-of-time compilation: the released width of 72 channels, a power of two, and the widest."""

from __future__ import annotations

from meddiff.kernels.adaln import _BLOCKS_PER_RUN, _bwd_kernel, _configuration, _fwd_kernel

_POINTERS = ("dr", "dy", "x", "gate", "h", "shift", "scale", "r", "y", "dx", "dh")
_FLOAT32_POINTERS = ("statistics", "sums")


def _case(kernel, name: str, dtype: str, channels: int, gated: bool, norm: bool) -> dict:
    constexprs = _configuration(channels, kernel is _bwd_kernel)
    num_warps = constexprs.pop("num_warps")
    constexprs |= {"C": channels, "GATED": gated, "NORM": norm, "x_c": 1, "h_c": 1}
    if kernel is _bwd_kernel:
        constexprs |= {"BLOCKS": _BLOCKS_PER_RUN, "dr_c": 1, "dy_c": 1}
    absent = set()
    if not gated:
        absent |= {"gate", "h", "dr"}
    if not norm:
        absent |= {"shift", "scale", "dy"}
    constexprs |= {argument: None for argument in kernel.arg_names if argument in absent}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument in _POINTERS:
            signature[argument] = f"*{dtype}"
        elif argument in _FLOAT32_POINTERS:
            signature[argument] = "*fp32"
        else:
            signature[argument] = "fp32" if argument == "eps" else "i64" if argument.endswith("_b") else "i32"
    parts = "gate, norm" if gated and norm else "gate" if gated else "norm"
    return {
        "name": f"adaln {name} {dtype}, {parts}, {channels} channels",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": num_warps,
        "tensor_core": False,
    }


_GATED_AND_NORM = [(True, True), (True, False), (False, True)]
CASES = [
    _case(kernel, name, dtype, channels, gated, norm)
    for kernel, name in ((_fwd_kernel, "forward"), (_bwd_kernel, "backward"))
    for dtype, channels, parts in (
        ("bf16", 72, _GATED_AND_NORM),
        ("fp32", 72, _GATED_AND_NORM),
        ("fp16", 72, _GATED_AND_NORM[:1]),
        ("bf16", 256, _GATED_AND_NORM[:1]),
        ("fp32", 4096, _GATED_AND_NORM[:1]),
    )
    for gated, norm in parts
]
