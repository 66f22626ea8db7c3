"""The networks: Patch-Volume autoencoder, codebook, BiFlowNet and its ControlNet (Wang et al., TMI 2025)."""

from meddiff.models.autoencoder import PatchVolumeAutoencoder
from meddiff.models.biflownet import BiFlowNet
from meddiff.models.codebook import Codebook, LatentScale
from meddiff.models.controlnet import Control, ControlNet, SteeredDenoiser

__all__ = [
    "BiFlowNet",
    "Codebook",
    "Control",
    "ControlNet",
    "LatentScale",
    "PatchVolumeAutoencoder",
    "SteeredDenoiser",
]
