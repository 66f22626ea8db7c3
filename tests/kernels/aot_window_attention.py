"""Cases of ahead-of-time compilation: 512- and 64-token windows, the released heads of 9, and the largest heads."""

from __future__ import annotations

import torch

from meddiff.kernels.window_attention import _bwd_dkdv_kernel, _bwd_dq_kernel, _configuration, _fwd_kernel

_POINTERS = {"qkv": 0, "out": 0, "grad": 0, "lse": 1, "dqkv": 0}  # 1: float32 always
_INTEGERS = ("D", "H", "W", "stride_b", "stride_d", "stride_h", "stride_w")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _case(kernel, name: str, dtype: str, head_dim: int, window: int) -> dict:
    constexprs = _configuration(head_dim, window, _DTYPES[dtype], kernel is not _fwd_kernel)
    num_warps = constexprs.pop("num_warps")
    constexprs |= {"HEADS": 8, "DIM": head_dim, "WINDOW": window, "stride_c": 1}
    signature = {}
    for argument in kernel.arg_names:
        if argument in _POINTERS:
            signature[argument] = "*fp32" if _POINTERS[argument] else f"*{dtype}"
        elif argument in _INTEGERS:
            signature[argument] = "i64" if argument == "stride_b" else "i32"
        else:
            signature[argument] = "constexpr" if argument in constexprs else "fp32"
    return {
        "name": f"window_attention {name} {dtype}, {window**3} tokens, heads of {head_dim}",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": num_warps,
        "tensor_core": dtype != "fp32",
    }


_HEADS_AND_WINDOWS = {
    "fp32": [(9, 8), (64, 8)],
    "fp16": [(9, 8)],
    "bf16": [(9, 8), (9, 4), (32, 8), (64, 8)],
}
CASES = [
    _case(kernel, name, dtype, head_dim, window)
    for kernel, name in ((_fwd_kernel, "forward"), (_bwd_dq_kernel, "dq"), (_bwd_dkdv_kernel, "dk dv"))
    for dtype, sizes in _HEADS_AND_WINDOWS.items()
    for head_dim, window in sizes
]
