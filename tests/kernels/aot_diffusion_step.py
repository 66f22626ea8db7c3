"""Cases of ahead-of-time compilation: each solver's terms, estimates of each dtype."""

from __future__ import annotations

from meddiff.kernels.diffusion_step import _BLOCK, _step_kernel


def _case(dtype: str, noise: bool, history: bool) -> dict:
    constexprs = {"NOISE": noise, "HISTORY": history, "BLOCK": _BLOCK}
    constexprs |= {} if noise else {"noise": None}
    constexprs |= {} if history else {"x0_prev": None}
    types = {"x": "*fp32", "estimate": f"*{dtype}", "coefficients": "*fp32", "noise": "*fp32", "x0_prev": "*fp32"}
    types["size"] = "i64"
    terms = "".join([", noise"] * noise + [", history"] * history)
    return {
        "name": f"diffusion_step {dtype}{terms}",
        "kernel": _step_kernel,
        "signature": {name: "constexpr" if name in constexprs else types[name] for name in _step_kernel.arg_names},
        "constexprs": constexprs,
        "num_warps": 4,
        "tensor_core": False,
    }


CASES = [
    _case(dtype, noise, history)
    for dtype in ("fp32", "fp16", "bf16")
    for noise, history in ((False, False), (True, False), (False, True))
]
