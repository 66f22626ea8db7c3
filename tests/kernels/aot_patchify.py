"""Cases of ahead-of-time compilation: the released patch of 64 from each dtype, and the latent's patches of 8 and 16."""

from __future__ import annotations

from meddiff.kernels.patchify import _BLOCK, _patchify_kernel, _stitch_kernel

_SCALARS = {"low": "fp32", "gain": "fp32"}


def _case(kernel, name: str, source: str, target: str, strides_of: str, **constexprs: int) -> dict:
    """`strides_of` names the argument whose elements lie side by side, as Triton is told for a stride of 1."""
    constexprs |= {"BLOCK": _BLOCK, strides_of: 1}
    types = {"x": f"*{source}", "patches": f"*{target}", "volume": f"*{target}"} | _SCALARS
    if kernel is _stitch_kernel:
        types["patches"] = f"*{source}"
    signature = {
        argument: "constexpr"
        if argument in constexprs
        else types.get(argument, "i64" if "stride" in argument else "i32")
        for argument in kernel.arg_names
    }
    return {
        "name": f"{name} {source} to {target}, {constexprs['C']} of {constexprs['P']}³",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": 4,
        "tensor_core": False,
    }


CASES = [
    _case(_patchify_kernel, "patchify", source, target, "stride_w", C=1, P=64, MAP=True, WHOLE=whole, EDGE=True)
    for source, target in (("i16", "bf16"), ("u8", "fp16"), ("fp32", "bf16"), ("fp32", "fp32"))
    for whole in (True, False)
]
CASES += [
    _case(
        _patchify_kernel, "gradient of stitch", "fp32", "fp32", "stride_w", C=8, P=p, MAP=False, WHOLE=whole, EDGE=False
    )
    for p, whole in ((8, True), (16, False))
]
CASES += [
    _case(_stitch_kernel, "stitch", source, "fp32", "stride_c", C=c, P=p)
    for source, c, p in (("bf16", 8, 8), ("fp32", 8, 16), ("fp16", 1, 64))
]
