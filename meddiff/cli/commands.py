"""The commands that work on one file or show what is there."""

from __future__ import annotations

from typing import Literal

from jsonargparse.typing import PositiveInt

from meddiff.cli.arguments import (
    Dtype,
    Modality,
    UsageError,
    check_target,
    check_window,
    describe_extent,
    load_model,
    parse_triple,
)


def measure(
    volume: str,
    out: str,
    control: str,
    modality: Modality | None = None,
    low: float | None = None,
    high: float | None = None,
    seed: int = 0,
) -> None:
    """Simulate what a ControlNet's task would measure of a volume: k-space lines, or projections.

    Args:
        out: File to write (.safetensors), for `meddiff generate --condition`.
        control: ControlNet folder, whose task it is.
        modality: CT (Hounsfield units) or MR; by default judged from the voxels.
        low: Intensity that maps to -1; by default -1000 for CT, the 0.5th percentile for MR. Goes with high.
        high: Intensity that maps to 1; by default 1000 for CT, the 99.5th percentile for MR.
        seed: Of the lines that are measured.
    """
    from meddiff.checkpoint import load_controlnet
    from meddiff.pipelines import Condition
    from meddiff.volume import Volume

    check_target(out, (".safetensors",))
    task = load_controlnet(control).task
    Condition.simulate(Volume.load(volume, modality, check_window(low, high)), task, seed).save(out, task)
    print(f"wrote {out}")


def reconstruct(
    volume: str,
    out: str,
    model: str | None = None,
    untrained: str | None = None,
    modality: Modality | None = None,
    low: float | None = None,
    high: float | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    budget: str | None = None,
) -> None:
    """Send a volume through the autoencoder: encode, quantise, decode jointly.

    Args:
        out: NIfTI file to write, with the same shape, orientation, affine and dtype.
        model: Model folder, or "organisation/name" on the Hugging Face hub; by default the small demo that ships.
        untrained: Preset with random weights instead of a model (8x, 4x, tiny): it gives noise, for trials.
        modality: CT (Hounsfield units) or MR; by default judged from the voxels.
        low: Intensity that maps to -1; by default -1000 for CT, the 0.5th percentile for MR. Goes with high.
        high: Intensity that maps to 1; by default 1000 for CT, the 99.5th percentile for MR.
        device: Such as cuda, cuda:1 or cpu; by default the GPU where there is one.
        dtype: Of the networks; by default bfloat16 where the device has it.
        budget: Memory that decoding may take beside the weights, such as 8GB; by default what is free.
    """
    from meddiff.volume import Volume

    check_target(out, (".nii", ".nii.gz"))
    window = check_window(low, high)
    original = Volume.load(volume, modality, window)
    pipeline = load_model(model, untrained, device, dtype, budget)
    if out.endswith(".nii"):
        pipeline.reconstruct_to(out, original)
    else:
        pipeline.reconstruct(original).save(out)
    print(f"wrote {out} ({describe_extent(original.shape, original.spacing)}, {original.intensity.modality})")


def encode(
    volume: str,
    out: str,
    model: str | None = None,
    untrained: str | None = None,
    modality: Modality | None = None,
    low: float | None = None,
    high: float | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Encode a volume into a latent file.

    Args:
        out: File to write (.safetensors): code indices, latent, and the volume's geometry and intensities.
        model: Model folder, or "organisation/name" on the Hugging Face hub; by default the small demo that ships.
        untrained: Preset with random weights instead of a model (8x, 4x, tiny), for trials.
        modality: CT (Hounsfield units) or MR; by default judged from the voxels.
        low: Intensity that maps to -1; by default -1000 for CT, the 0.5th percentile for MR. Goes with high.
        high: Intensity that maps to 1; by default 1000 for CT, the 99.5th percentile for MR.
        device: Such as cuda, cuda:1 or cpu; by default the GPU where there is one.
        dtype: Of the networks; by default bfloat16 where the device has it.
    """
    from meddiff.volume import Volume

    check_target(out, (".safetensors",))
    window = check_window(low, high)
    original = Volume.load(volume, modality, window)
    encoded = load_model(model, untrained, device, dtype).encode(original)
    encoded.save(out)
    print(f"wrote {out} (latent {'×'.join(map(str, encoded.indices.shape))})")


def decode(
    latent: str,
    out: str,
    model: str | None = None,
    untrained: str | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    budget: str | None = None,
) -> None:
    """Decode a latent file into a volume.

    Args:
        out: NIfTI file to write, in the geometry, units and dtype of the volume that was encoded.
        model: The model that encoded it.
        untrained: The preset with random weights that encoded it.
        device: Such as cuda, cuda:1 or cpu; by default the GPU where there is one.
        dtype: Of the networks; by default bfloat16 where the device has it.
        budget: Memory that decoding may take beside the weights, such as 8GB; by default what is free.
    """
    from meddiff.pipelines import EncodedVolume

    check_target(out, (".nii", ".nii.gz"))
    encoded = EncodedVolume.load(latent)
    pipeline = load_model(model, untrained, device, dtype, budget)
    if out.endswith(".nii"):
        pipeline.decode_to(out, encoded)
    else:
        pipeline.decode(encoded).save(out)
    print(f"wrote {out} ({'×'.join(map(str, encoded.shape))} voxels, {encoded.intensity.modality})")


def plan(
    size: PositiveInt | str = 512,
    preset: Literal["8x", "4x", "tiny"] = "8x",
    budget: str | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Show how a volume would be decoded jointly within a budget of memory: what is kept, in what slabs, how long.

    Args:
        size: Voxels along the file's axes, such as 512 or 256x256x128; multiples of the downsampling factor.
        preset: Which autoencoder.
        budget: Memory beside the weights, such as 8GB, 900MB or 7.5GiB; by default what is free.
        device: Such as cuda, cuda:1 or cpu; by default the GPU where there is one.
        dtype: Of the network; by default bfloat16 where the device has it.
    """
    import torch

    from meddiff.config import PRESETS
    from meddiff.decode import make_plan
    from meddiff.models import PatchVolumeAutoencoder
    from meddiff.resources import available_bytes, bytes_of, default_device, default_dtype

    config = PRESETS[preset].autoencoder
    x, y, z = parse_triple(size, int)
    if any(n % config.downsample for n in (x, y, z)):
        raise UsageError(f"--size must be multiples of {config.downsample}, got {size}")
    place = torch.device(device) if device else default_device()
    precision = getattr(torch, dtype) if dtype else default_dtype(place)
    with torch.device("meta"):
        layers = PatchVolumeAutoencoder(config).decoder.layers()
    latent = (1, config.embedding_dim, *(n // config.downsample for n in (z, x, y)))
    try:
        limit = bytes_of(budget) if budget else available_bytes(place)
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(make_plan(layers, latent, precision, place, limit).table())


def convert(out: str, autoencoder: str, denoiser: str) -> None:
    """Turn the released checkpoints of 3D MedDiffusion into a model folder. No code in the files is run.

    Args:
        autoencoder: Lightning checkpoint of the Patch-Volume autoencoder.
        denoiser: Checkpoint of BiFlowNet.
    """
    from meddiff.conversion import convert as convert_files

    print(convert_files(autoencoder, denoiser, out))
    print(f"wrote {out}")


def doctor() -> None:
    """Print what is installed and active, and what to do about what is missing."""
    from meddiff.doctor import examine

    print(examine())
