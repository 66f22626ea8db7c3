"""meddiff: a kernel-optimised engine for 3D medical latent diffusion (Wang et al., "3D MedDiffusion", IEEE TMI 2025).

>>> import meddiff
>>> model = meddiff.from_pretrained("my-model")
>>> model.generate("ct_chest_abdomen", size=(256, 256, 256), seed=1).save("chest.nii.gz")
>>> model.reconstruct(meddiff.Volume.load("scan.nii.gz")).save("reconstruction.nii.gz")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meddiff import ops
    from meddiff.acceleration import accelerate, restore
    from meddiff.pipelines import MedDiffusion
    from meddiff.volume import Volume

    from_pretrained = MedDiffusion.from_pretrained
    untrained = MedDiffusion.untrained

__all__ = ["MedDiffusion", "Volume", "accelerate", "from_pretrained", "ops", "restore", "untrained"]
__version__ = "0.1.0"

# Loaded on first use, so that `import meddiff` costs nothing and starts nothing.
_HOMES = {
    "MedDiffusion": ("meddiff.pipelines", "MedDiffusion"),
    "Volume": ("meddiff.volume", "Volume"),
    "accelerate": ("meddiff.acceleration", "accelerate"),
    "from_pretrained": ("meddiff.pipelines", "MedDiffusion.from_pretrained"),
    "ops": ("meddiff.ops", ""),
    "restore": ("meddiff.acceleration", "restore"),
    "untrained": ("meddiff.pipelines", "MedDiffusion.untrained"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'meddiff' has no attribute {name!r}")
    module, path = _HOMES[name]
    value: Any = importlib.import_module(module)
    for part in filter(None, path.split(".")):
        value = getattr(value, part)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
