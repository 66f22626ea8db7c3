"""Whole jobs: from volumes and conditions to volumes."""

from meddiff.pipelines.generate import Outcome, VolumeJob, generate_volumes
from meddiff.pipelines.latents import EncodedVolume
from meddiff.pipelines.model import MedDiffusion

__all__ = ["EncodedVolume", "MedDiffusion", "Outcome", "VolumeJob", "generate_volumes"]
