"""Cases of ahead-of-time compilation: the released codes of 8, each dtype, and the narrowest and widest codes."""

from __future__ import annotations

from meddiff.kernels.vq_fused import _configuration, _decode_kernel, _encode_kernel

_POINTERS = ("features", "weight", "vector", "latent", "rows", "codes", "centred", "bias", "centre", "radius", "table")


def _case(kernel, name: str, dtype: str, channels: int, **flags: int) -> dict:
    """`dtype` is that of the encoder's patches or of the table; all else is float32."""
    typed = ("features",) if kernel is _encode_kernel else ("table", "rows")
    constexprs = _configuration(channels) | flags | {"C": channels, "stride_c": 1}
    num_warps = constexprs.pop("num_warps")
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument in _POINTERS:
            signature[argument] = f"*{dtype}" if argument in typed else "*fp32"
        elif argument == "index":
            signature[argument] = "*i64"
        elif argument in ("half", "low"):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i64" if "stride" in argument else "i32"
    return {
        "name": f"{name} {dtype}, codes of {channels}",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": num_warps,
        "tensor_core": True,
    }


_SIZES = [("fp32", 8), ("fp16", 8), ("bf16", 8), ("fp32", 4), ("fp32", 16), ("fp32", 32), ("fp32", 64)]
CASES = [_case(_encode_kernel, "vq_encode", dtype, c, SEARCH=True, ROWS=True, Q=8) for dtype, c in _SIZES]
CASES += [_case(_encode_kernel, "vq_encode without codes", "bf16", 8, SEARCH=False, ROWS=False, Q=16)]
CASES += [_case(_decode_kernel, "vq_decode", dtype, c, UNSCALE=True, BLOCK_M=16) for dtype, c in _SIZES[:4]]
CASES += [_case(_decode_kernel, "vq_decode, wide", dtype, c, UNSCALE=False, BLOCK_M=64) for dtype, c in _SIZES[4:]]
