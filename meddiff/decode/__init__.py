"""Joint decoding of any size in any memory: the vocabulary of layers, the planner, and what runs a plan.

`meddiff.decode.plan` is the function that prices a module; the planner's submodule of that name is there for imports.
"""

from meddiff.decode.chain import UnsupportedLayer, layers_of, tiled_decode
from meddiff.decode.chain import plan_decoder as plan
from meddiff.decode.joint import OnSlab, decode_jointly
from meddiff.decode.layers import Attention, Blur, Conv, Interpolate, Layer, Norm, UpConv
from meddiff.decode.plan import Plan, make_plan

__all__ = [
    "Attention",
    "Blur",
    "Conv",
    "Interpolate",
    "Layer",
    "Norm",
    "OnSlab",
    "Plan",
    "UnsupportedLayer",
    "UpConv",
    "decode_jointly",
    "layers_of",
    "make_plan",
    "plan",
    "tiled_decode",
]
