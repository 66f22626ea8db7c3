"""Joint decoding of any size in any memory: the vocabulary of layers, the planner, and what runs a plan."""

from meddiff.decode.joint import OnSlab, decode_jointly
from meddiff.decode.layers import Attention, Conv, Layer, Norm, UpConv
from meddiff.decode.plan import Plan, make_plan

__all__ = ["Attention", "Conv", "Layer", "Norm", "OnSlab", "Plan", "UpConv", "decode_jointly", "make_plan"]
