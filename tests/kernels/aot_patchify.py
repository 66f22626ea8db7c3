"""Cases of ahead-of-time compilation: the released patch of 64 from each dtype, and latent patches of 8 and 16."""

from __future__ import annotations

from meddiff.kernels.patchify import _BLOCK, _patchify_kernel, _stitch_kernel


def _case(kernel, name: str, source: str, target: str, side_by_side: str, **constexprs: int) -> dict:
    """`side_by_side` is the stride that is 1."""
    constexprs |= {"BLOCK": _BLOCK, side_by_side: 1}
    types = {"x": f"*{source}", "patches": f"*{target}", "volume": f"*{target}", "low": "fp32", "gain": "fp32"}
    if kernel is _stitch_kernel:
        types["patches"] = f"*{source}"
    types |= dict.fromkeys(constexprs, "constexpr")
    return {
        "name": f"{name} {source} to {target}, {constexprs['C']} of {constexprs['P']}³"
        + ("" if constexprs.get("WHOLE", True) else ", padded"),
        "kernel": kernel,
        "signature": {a: types.get(a, "i64" if "stride" in a else "i32") for a in kernel.arg_names},
        "constexprs": constexprs,
        "num_warps": 4,
        "tensor_core": False,
    }


_MAPPED = {"MAP": True, "EDGE": True, "C": 1, "P": 64}
_AS_IS = {"MAP": False, "EDGE": False, "C": 8}
CASES = [
    *(
        _case(_patchify_kernel, "patchify", source, target, "stride_w", WHOLE=whole, **_MAPPED)
        for source, target in (("i16", "bf16"), ("u8", "fp16"), ("fp32", "bf16"), ("fp32", "fp32"))
        for whole in (True, False)
    ),
    *(
        _case(_patchify_kernel, "gradient of stitch", "fp32", "fp32", "stride_w", WHOLE=whole, P=p, **_AS_IS)
        for p, whole in ((8, True), (16, False))
    ),
    *(
        _case(_stitch_kernel, "stitch", source, "fp32", "stride_c", C=c, P=p)
        for source, c, p in (("bf16", 8, 8), ("fp32", 8, 16), ("fp16", 1, 64))
    ),
]
