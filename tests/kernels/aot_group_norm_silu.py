"""Cases of ahead-of-time compilation: the released widths of the U-Net and of the decoder, with and without scale."""

from __future__ import annotations

from meddiff.kernels import group_norm_silu as module
from meddiff.kernels.group_norm_silu import _configuration

_VOLUMES = ("x", "y", "dy", "dx")  # of the case's dtype, as weight, bias, scale and shift
_FLOAT32 = ("partial", "stats", "sums", "line")


def _case(kernel, name: str, dtype: str, channels: int, modulated: bool) -> dict:
    large, merge = _configuration(channels, 24)
    constexprs = (merge if "BLOCK_S" in kernel.arg_names else large) | {"MODULATED": modulated, "SILU": True}
    constexprs |= {"ROWS": 8 * large["BLOCK_N"], "scale_c": 1, "shift_c": 1}
    num_warps = constexprs.pop("num_warps")
    constexprs = {key: value for key, value in constexprs.items() if key in kernel.arg_names}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument in _FLOAT32:
            signature[argument] = "*fp32"
        elif argument in _VOLUMES or argument in ("weight", "bias", "scale", "shift"):
            signature[argument] = f"*{dtype}"
        else:
            signature[argument] = "fp32" if argument == "eps" else "i32"
    return {
        "name": f"group_norm_silu {name} {dtype}, {channels} channels{', modulated' if modulated else ''}",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": num_warps,
        "tensor_core": False,
    }


_KERNELS = {
    "moments": (module._moments_kernel, False),
    "merged moments": (module._merge_moments_kernel, False),
    "apply": (module._apply_kernel, True),
    "sums": (module._sums_kernel, True),
    "merged sums": (module._merge_sums_kernel, True),
    "dx": (module._dx_kernel, True),
}
CASES = [
    _case(kernel, name, dtype, channels, has_scale and modulated)
    for name, (kernel, has_scale) in _KERNELS.items()
    for dtype, channels, modulated in (
        ("bf16", 72, True),
        ("bf16", 576, True),
        ("fp32", 48, False),
        ("fp16", 144, True),
    )
]
