"""Encoded volumes on disk: one safetensors file with everything that decoding needs."""

from __future__ import annotations

import base64
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meddiff.files import atomic_write
from meddiff.volume import IntensityScale, Source

_FORMAT = "meddiff-encoded-volume-1"


@dataclass(frozen=True, eq=False)
class EncodedVolume:
    """A volume's latent with the volume's geometry.

    indices:         nearest codes, int64 [d, h, w]; these are what is decoded
    latent:          encoder output before quantisation, float32 [8, d, h, w]
    shape:           the volume's voxels along X, Y, Z; the latent covers them, padded to whole patches
    affine:          the volume's, float64 [4, 4] in mm, RAS+
    intensity:       the volume's intensity scale
    source:          how the volume was stored, or None
    codebook_sha256: fingerprint of the codebook that the indices belong to
    """

    indices: Tensor
    latent: Tensor
    shape: tuple[int, int, int]
    affine: np.ndarray
    intensity: IntensityScale
    source: Source | None
    codebook_sha256: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file atomically. Raises ValueError for another suffix, OSError if writing fails."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"EncodedVolume.save: {path}: the name must end in .safetensors")
        description = {
            "shape": list(self.shape),
            "affine": np.asarray(self.affine).tolist(),
            "intensity": [self.intensity.low, self.intensity.high, self.intensity.modality],
            "codebook_sha256": self.codebook_sha256,
            "source": self.source
            and {
                "header": base64.b64encode(self.source.header.binaryblock).decode(),
                "nifti_version": self.source.nifti_version,
                "big_endian": self.source.header.endianness == ">",
                "orientation": list(self.source.orientation),
            },
        }
        tensors = {"indices": self.indices.to(torch.int32), "latent": self.latent.contiguous()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"format": _FORMAT, "description": json.dumps(description)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncodedVolume:
        """Read a file that `save` wrote.

        Raises FileNotFoundError for a missing file, ValueError for a damaged or foreign one.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"EncodedVolume.load: {path}: no such file")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError("not an encoded volume (meddiff encode writes them)")
                described = json.loads(metadata["description"])
                indices, latent = file.get_tensor("indices").long(), file.get_tensor("latent")
            source = described["source"]
            if source is not None:
                header_class = {1: nib.Nifti1Header, 2: nib.Nifti2Header}[source["nifti_version"]]
                block = base64.b64decode(source["header"], validate=True)
                header = header_class(block, endianness=">" if source["big_endian"] else "<")
                source = Source(header, tuple(source["orientation"]))
            shape = tuple(described["shape"])
            if latent.shape[1:] != indices.shape or len(shape) != 3 or math.prod(shape) <= 0:
                raise ValueError(f"its indices {tuple(indices.shape)} and latent {tuple(latent.shape)} disagree")
            return cls(
                indices,
                latent,
                shape,
                np.array(described["affine"], dtype=np.float64),
                IntensityScale(*described["intensity"]),
                source,
                str(described["codebook_sha256"]),
            )
        except (SafetensorError, ValueError, KeyError, TypeError, nib.spatialimages.HeaderDataError) as error:
            raise ValueError(f"EncodedVolume.load: {path}: {error!s:.300}; encode the volume again") from error
