"""How good a model is: reconstructions against their originals, seams, and generated volumes against real ones.

All figures are taken on volumes in [-1, 1], through monai.metrics: PSNR and SSIM over whole volumes (data range 2, the
3D Gaussian window of 11 voxels and σ = 1.5 of Wang et al. 2004), MS-SSIM (Wang et al. 2003), FID (Heusel et al. 2017)
and MMD (Gretton et al. 2012, linear kernel).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import torch
from monai.metrics import FIDMetric, MMDMetric, MultiScaleSSIMMetric, PSNRMetric, SSIMMetric
from monai.networks.nets import resnet10
from torch import Tensor

from meddiff.checkpoint import fingerprint, load_component, locate
from meddiff.files import write_json
from meddiff.models import PatchVolumeAutoencoder
from meddiff.progress import progress
from meddiff.resources import default_device, default_dtype
from meddiff.training.data import leave_out, list_volumes, preparation
from meddiff.training.options import EvaluationOptions

_RANGE = 2.0  # of intensities in [-1, 1]
_WINDOW = 11  # voxels along each axis of SSIM's window
_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # from fine to coarse


def evaluate(options: EvaluationOptions) -> Path:
    """Measure an autoencoder on volumes, and generated volumes against them; writes `out`, a JSON file, returns it.

    "volumes" holds for each: psnr (dB), ssim, ms_ssim of the reconstruction (encoded in patches, decoded jointly), the
    seam score of it (seam) and of the original (seam_original), and the same of a decode in disjoint patches, where
    asked for; "mean" the means over the volumes. "generated" holds fid, mmd and the extractor with its SHA-256.

    Raises ValueError and CheckpointError for options, data and models that cannot be used, VolumeError for a bad file
    where that is fatal.
    """
    device = default_device()
    source = locate(options.model)
    folder = source / "autoencoder" if (source / "autoencoder").is_dir() else source
    autoencoder = load_component(folder, "autoencoder", device, default_dtype(device))
    results = {
        "format": "meddiff-evaluation-1",
        "model": options.model,
        "autoencoder_sha256": fingerprint(autoencoder),
        "dtype": str(autoencoder.dtype).removeprefix("torch."),
        "device": str(device),
        "data": options.data,
        "versions": {name: version(name) for name in ("meddiff", "torch", "monai")},
    }
    extract = None
    if options.generated is not None:
        extract, results["features"] = _extractor(options, autoencoder, folder)

    scores, real = [], []
    for file, x in _volumes(options, options.data, "evaluating"):
        x = x.to(device)
        scores.append({"file": file, "size": [x.shape[3], x.shape[4], x.shape[2]]})
        scores[-1] |= reconstruction_scores(autoencoder, x, options.disjoint)
        if extract:
            real.append(extract(x))
    names = [name for name, value in scores[0].items() if isinstance(value, float)]
    results["mean"] = {name: fmean(score[name] for score in scores) for name in names}
    results["volumes"] = scores
    if extract:
        generated = [extract(x.to(device)) for _, x in _volumes(options, options.generated, "features")]
        results["generated"] = distribution_distances(torch.cat(generated), torch.cat(real))
    write_json(options.out, results)
    return Path(options.out)


def _volumes(options: EvaluationOptions, source: str, title: str) -> Iterator[tuple[str, Tensor]]:
    """The volumes of a folder or list: file name, float32 [1, 1, D, H, W] in [-1, 1]."""
    prepare = preparation(options.spacing)
    found = 0
    for volume in progress(title)(list_volumes(source)):
        try:
            x = prepare({"image": volume.file, "modality": volume.modality, "low": volume.low, "high": volume.high})
        except Exception as error:
            leave_out(error, options.on_bad)
            continue
        found += 1
        yield Path(volume.file).name, x["image"][None]
    if not found:
        raise ValueError(f"evaluate: {source}: none of its volumes can be used; the log says why")


@torch.inference_mode()
def reconstruction_scores(autoencoder: PatchVolumeAutoencoder, x: Tensor, disjoint: bool = False) -> dict[str, float]:
    """Scores of the reconstruction of x, float32 [1, 1, D, H, W] in [-1, 1].

    disjoint: also those of decoding every patch by itself, with the prefix "disjoint_".
    """
    patch = autoencoder.config.patch_size
    d, h, w = x.shape[2:]
    indices, _ = autoencoder.quantize(autoencoder.encode(x))
    decoded = {"": autoencoder.decode(indices)}
    if disjoint:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the seams, which are wanted here
            decoded["disjoint_"] = autoencoder.decode(indices, joint=False, tile=patch)
    scores = {"seam_original": seam_score(x, patch)}
    for prefix, y in decoded.items():
        y = y[..., :d, :h, :w].float().clamp(-1, 1)
        scores |= {prefix + name: value for name, value in similarity(y, x).items()}
        scores[prefix + "seam"] = seam_score(y, patch)
    return scores


def similarity(y: Tensor, x: Tensor) -> dict[str, float]:
    """PSNR in dB, SSIM and MS-SSIM of y against x, both float32 [1, 1, D, H, W] in [-1, 1].

    MS-SSIM takes as many of its five scales as the volume has room for, with their weights scaled to a sum of one; SSIM
    and MS-SSIM are left out for volumes smaller than their window.
    """
    scores = {"psnr": PSNRMetric(_RANGE)(y, x).item()}
    room = min(x.shape[2:]) // _WINDOW
    if room:
        scores["ssim"] = SSIMMetric(spatial_dims=3, data_range=_RANGE, win_size=_WINDOW)(y, x).item()
        # the last of n scales is 2ⁿ⁻¹ times smaller, and MONAI asks for (n - 1)² windows
        scales = max(n for n in range(1, len(_MS_SSIM_WEIGHTS) + 1) if room >= max(2 ** (n - 1), (n - 1) ** 2))
        weights = _MS_SSIM_WEIGHTS[:scales]
        metric = MultiScaleSSIMMetric(
            spatial_dims=3, data_range=_RANGE, kernel_size=_WINDOW, weights=[w / sum(weights) for w in weights]
        )
        scores["ms_ssim"] = metric(y, x).item()
    return scores


def seam_score(x: Tensor, patch: int) -> float:
    """Mean absolute step between voxels on two sides of a patch face, over the mean of all other steps.

    x: [1, 1, D, H, W]; patch: voxels along each axis of a patch, the first of which begins at the first voxel. Near 1
    where faces do not show (anatomy that happens to lie at a face adds to it: compare with the original's score); NaN
    for a constant volume and for one without inner faces.
    """
    at_faces, elsewhere = [], []
    for axis in (2, 3, 4):
        steps = x.diff(dim=axis).abs().transpose(0, axis).flatten(1)
        is_face = (torch.arange(1, x.shape[axis], device=x.device) % patch) == 0
        at_faces.append(steps[is_face].flatten())
        elsewhere.append(steps[~is_face].flatten())
    return (torch.cat(at_faces).double().mean() / torch.cat(elsewhere).double().mean()).item()


def distribution_distances(generated: Tensor, real: Tensor) -> dict[str, float]:
    """FID and MMD of feature vectors [n, F] and [m, F]; MMD takes as many of each as there are of the fewer.

    Raises ValueError for less than two of either.
    """
    fewer = min(len(generated), len(real))
    if fewer < 2:
        raise ValueError(f"evaluate: FID and MMD need two volumes of each kind, got {len(generated)} and {len(real)}")
    return {
        "fid": FIDMetric()(generated, real).item(),
        "mmd": MMDMetric()(real[:fewer], generated[:fewer]).item(),
        "count": len(generated),
        "real_count": len(real),
    }


def _extractor(
    options: EvaluationOptions, autoencoder: PatchVolumeAutoencoder, folder: Path
) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """The function [1, 1, D, H, W] → float32 [1, F], and what it is: name, weights and their SHA-256."""
    if options.features == "autoencoder":
        weights = folder / "model.safetensors"

        @torch.inference_mode()
        def extract(x: Tensor) -> Tensor:
            z = autoencoder.encode(x).flatten(2)
            return torch.cat([z.mean(2), z.std(2)], 1).cpu()

    else:
        if options.features_weights is None or not Path(options.features_weights).is_file():
            raise ValueError(
                f"evaluate: features medicalnet need features_weights, the file resnet_10_23dataset.pth of "
                f"TencentMedicalNet/MedicalNet-Resnet10 on the Hugging Face hub, got {options.features_weights}"
            )
        weights = Path(options.features_weights)
        network = _medicalnet(weights).to(autoencoder.device)

        @torch.inference_mode()
        def extract(x: Tensor) -> Tensor:
            return network((x - x.mean()) / x.std().clamp_min(1e-6)).cpu()

    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    print(f"features: {options.features}, {weights.name}, SHA-256 {digest}")
    return extract, {"extractor": options.features, "weights": weights.name, "sha256": digest}


def _medicalnet(weights: Path) -> torch.nn.Module:
    """MedicalNet's 3D ResNet-10 (Chen et al. 2019) up to its pooled 512 features, in eval mode."""
    network = resnet10(spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type="B", bias_downsample=False)
    try:
        stored = torch.load(weights, map_location="cpu", weights_only=True)
        stored = stored.get("state_dict", stored)
        network.load_state_dict({key.removeprefix("module."): value for key, value in stored.items()})
    except Exception as error:  # pickle, archive and state dict each have their own
        reason = str(error).partition("\n")[0]
        raise ValueError(f"evaluate: {weights}: not the weights of MedicalNet's ResNet-10: {reason}") from None
    return network.requires_grad_(False).eval()
