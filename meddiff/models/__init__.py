"""The networks: Patch-Volume autoencoder, codebook and BiFlowNet (Wang et al., TMI 2025)."""

from meddiff.models.autoencoder import PatchVolumeAutoencoder
from meddiff.models.biflownet import BiFlowNet
from meddiff.models.codebook import Codebook, LatentScale

__all__ = ["BiFlowNet", "Codebook", "LatentScale", "PatchVolumeAutoencoder"]
