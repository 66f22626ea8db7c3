"""Whole jobs: from volumes and conditions to volumes."""

from meddiff.pipelines.latents import EncodedVolume
from meddiff.pipelines.model import MedDiffusion

__all__ = ["EncodedVolume", "MedDiffusion"]
