from __future__ import annotations

import json
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch

import meddiff
from meddiff.pipelines import EncodedVolume
from meddiff.volume import IntensityScale, Volume


@pytest.fixture(scope="module")
def model():
    return meddiff.untrained("tiny", dtype=torch.float32, device="cpu")


@pytest.fixture
def scan(tmp_path):
    """An MR in LPS orientation with oblique axes, stored as int16 with a slope."""
    data = np.random.default_rng(0).integers(0, 900, (21, 34, 17)).astype(np.int16)
    angle = 0.2
    affine = np.array(
        [
            [-np.cos(angle), np.sin(angle), 0, 80],
            [-np.sin(angle), -np.cos(angle), 0, 95],
            [0, 0, 2.5, -40],
            [0, 0, 0, 1],
        ]
    )
    image = nib.Nifti1Image(data, affine)
    image.header.set_slope_inter(2.0, 10.0)
    image.to_filename(tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_reconstruction_keeps_the_file_as_it_was(model, scan, tmp_path):
    model.reconstruct(Volume.load(scan)).save(tmp_path / "again.nii.gz")
    before, after = nib.load(scan), nib.load(tmp_path / "again.nii.gz")
    assert after.shape == before.shape and after.get_data_dtype() == before.get_data_dtype()
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.dataobj.slope == 2.0 and after.dataobj.inter == 10.0


def test_reconstruction_is_the_autoencoder_on_the_volume(model, scan):
    volume = Volume.load(scan)
    with torch.inference_mode():
        wanted = model.autoencoder(volume.to_tensor()).clamp(-1, 1)
    torch.testing.assert_close(model.reconstruct(volume).to_tensor(), wanted, rtol=0, atol=1e-5)


def test_encoded_volumes_survive_the_disk(model, scan, tmp_path):
    volume = Volume.load(scan)
    encoded = model.encode(volume)
    encoded.save(tmp_path / "latent.safetensors")
    again = EncodedVolume.load(tmp_path / "latent.safetensors")
    assert torch.equal(again.indices, encoded.indices) and torch.equal(again.latent, encoded.latent)
    model.decode(again).save(tmp_path / "decoded.nii.gz")
    model.reconstruct(volume).save(tmp_path / "reconstructed.nii.gz")
    assert (tmp_path / "decoded.nii.gz").read_bytes() == (tmp_path / "reconstructed.nii.gz").read_bytes()


def test_streamed_files_are_those_that_are_saved(model, scan, tmp_path):
    volume = Volume.load(scan)
    model.reconstruct(volume).save(tmp_path / "saved.nii")
    model.reconstruct_to(tmp_path / "streamed.nii", volume)
    assert (tmp_path / "streamed.nii").read_bytes() == (tmp_path / "saved.nii").read_bytes()
    with pytest.warns(UserWarning, match="quality at other sizes"):
        record = model.generate_to(tmp_path / "mr.nii", "mr_abdomen", (64, 64, 64), steps=1, seed=5)
        generated = model.generate("mr_abdomen", (64, 64, 64), steps=1, seed=5)
    assert json.loads((tmp_path / "mr.json").read_text()) == record
    unequal = {key for key in record if record[key] != generated.record[key]}
    assert unequal <= {"created", "stages"} and record.keys() == generated.record.keys()
    generated.save(tmp_path / "generated.nii")
    assert (tmp_path / "mr.nii").read_bytes() == (tmp_path / "generated.nii").read_bytes()


def test_every_decode_keeps_to_the_budget(scan, tmp_path):
    model = meddiff.untrained("tiny", dtype=torch.float32, device="cpu")
    volume, latent = Volume.load(scan), torch.randn(1, 8, 8, 8, 8)
    encoded, free = model.encode(volume), model.decode_latent(latent)
    verbs = (
        lambda: model.decode_latent(latent),
        lambda: model.decode(encoded),
        lambda: model.decode_to(tmp_path / "a.nii", encoded),
        lambda: model.generate_to(tmp_path / "a.nii", "ct_legs", (64, 64, 64), steps=1),
    )
    model.memory_budget = 1000
    for verb in verbs:
        with pytest.raises(MemoryError, match="at least"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verb()
    assert [path.name for path in tmp_path.iterdir()] == [scan.name]
    model.memory_budget = 8_000_000
    torch.testing.assert_close(model.decode_latent(latent), free, rtol=0, atol=1e-4)


def test_an_interrupted_decode_leaves_no_file(model, tmp_path, monkeypatch):
    def interrupt(latent, budget, on_slab, **options):
        on_slab(torch.zeros(1, 1, 4, 64, 64), 0, 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(model.autoencoder, "decode_latent", interrupt)
    with pytest.warns(UserWarning), pytest.raises(KeyboardInterrupt):
        model.generate_to(tmp_path / "a.nii", "ct_legs", (64, 64, 64), steps=1)
    with pytest.raises(ValueError, match="must end in .nii"):
        model.generate_to(tmp_path / "a.nii.gz")
    assert list(tmp_path.iterdir()) == []


def test_another_dtype_decodes_and_another_codebook_does_not(model, scan):
    encoded = model.encode(Volume.load(scan))
    rounded = meddiff.untrained("tiny", dtype=torch.bfloat16, device="cpu")
    assert rounded.decode(encoded).shape == (21, 34, 17)
    with pytest.raises(ValueError, match="another codebook"):
        meddiff.untrained("tiny", seed=1, device="cpu").decode(encoded)


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "edited"])
def test_damaged_latents_are_refused(model, scan, tmp_path, damage):
    path = tmp_path / "latent.safetensors"
    if damage != "missing":
        model.encode(Volume.load(scan)).save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"indices": torch.zeros(1)}, path)
    elif damage == "edited":
        path.write_bytes(path.read_bytes().replace(b"nifti_version", b"nifti_revision"[:13]))
    with pytest.raises((ValueError, FileNotFoundError), match="latent.safetensors"):
        EncodedVolume.load(path)


def test_generation_is_seeded_and_recorded(model, tmp_path):
    with pytest.warns(UserWarning, match="quality at other sizes"):
        first = model.generate("mr_abdomen", (64, 128, 64), steps=2, seed=5)
        again = model.generate("mr_abdomen", (64, 128, 64), steps=2, seed=5)
        other = model.generate("mr_abdomen", (64, 128, 64), steps=2, seed=6)
    assert first.shape == (64, 128, 64) and first.spacing == (1.2, 1.2, 2)
    np.testing.assert_array_equal(first.data, again.data)
    assert np.abs(first.data - other.data).max() > 1
    assert 0 <= first.data.min() <= first.data.max() <= 1000

    first.save(tmp_path / "mr.nii.gz")
    record = json.loads((tmp_path / "mr.json").read_text())
    assert {k: record[k] for k in ("anatomy", "class", "size", "seed", "solver", "steps", "eta", "dtype")} == {
        "anatomy": "mr_abdomen",
        "class": 5,
        "size": [64, 128, 64],
        "seed": 5,
        "solver": "ddim",
        "steps": 2,
        "eta": 0.0,
        "dtype": "float32",
    }
    assert record["model"]["sha256"] == model.fingerprint and record["model"]["trained"] is False
    assert record["versions"]["meddiff"] == meddiff.__version__
    assert [stage["name"] for stage in record["stages"]] == ["sample", "decode"]
    assert all(stage["seconds"] > 0 for stage in record["stages"])


def test_generated_ct_is_int16_hounsfield_along_the_file_axes(model, tmp_path):
    with pytest.warns(UserWarning):
        volume = model.generate("ct_head_neck", (64, 64, 128), steps=1)
    volume.save(tmp_path / "ct.nii")
    image = nib.load(tmp_path / "ct.nii")
    assert image.shape == (64, 64, 128) and image.get_data_dtype() == np.int16
    assert image.header.get_xyzt_units()[0] == "mm" and nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert -1000 <= image.get_fdata().min() <= image.get_fdata().max() <= 1000


def test_generate_samples_the_latent_of_the_axis_rule(model):
    with pytest.warns(UserWarning):
        volume = model.generate("ct_legs", (64, 128, 192), steps=1, seed=3)
    latent = model.sample((24, 8, 16), 2, steps=1, seed=3)  # D, H, W = Z, X, Y
    np.testing.assert_allclose(volume.to_tensor(), model.decode_latent(latent), atol=1e-5)


def test_decoding_a_latent_unscales_and_quantises(model):
    latent = torch.rand(1, 8, 2, 3, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = model.autoencoder.codebook.embeddings
    z = (latent + 1) / 2 * (codes.max() - codes.min()) + codes.min()
    indices = torch.cdist(z.movedim(1, -1).reshape(-1, 8).double(), codes.double()).argmin(1).view(1, 2, 3, 4)
    with torch.inference_mode():
        wanted = model.autoencoder.decode(indices).clamp(-1, 1)
    torch.testing.assert_close(model.decode_latent(latent), wanted)


def test_saved_models_load_and_give_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = meddiff.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert loaded.config == model.config and loaded.trained and loaded.fingerprint == model.fingerprint
    latent = model.sample((8, 8, 8), 0, steps=2, seed=1)
    torch.testing.assert_close(loaded.sample((8, 8, 8), 0, steps=2, seed=1), latent)
    torch.testing.assert_close(loaded.decode_latent(latent), model.decode_latent(latent))


def test_untrained_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    first = meddiff.untrained("tiny", device="cpu").fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert meddiff.untrained("tiny", device="cpu").fingerprint == first
    assert meddiff.untrained("tiny", seed=1, device="cpu").fingerprint != first


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"anatomy": "hand"}, "unknown anatomy 'hand'; this model knows ct_head_neck"),
        ({"size": (64, 64, 100)}, r"multiples of 64 voxels .* nearest is \(64, 64, 128\)"),
        ({"size": 100}, r"got \(100, 100, 100\); nearest is \(128, 128, 128\)"),
        ({"size": (64, 64)}, "three multiples"),
        ({"size": (64, 64, 64), "spacing": (1, 1, 0)}, "positive"),
        ({"size": (64, 64, 64), "steps": 0}, "steps"),
    ],
)
@pytest.mark.filterwarnings("ignore:generate")
def test_errors_say_what_was_wanted(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"steps": 1} | arguments)
    with pytest.raises(ValueError, match="known are"):
        meddiff.untrained("16x")


@pytest.mark.filterwarnings("ignore:generate")
def test_one_number_is_a_cube(model):
    assert model.target(size=128) == model.target(size=(128, 128, 128))


def test_a_missing_gpu_is_named(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="meddiff doctor"):
        meddiff.untrained("tiny", device="cuda")
    with pytest.raises(ValueError, match="meddiff doctor"):
        model.decode_on("cuda")


def test_float16_is_for_gpus():
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        meddiff.untrained("tiny", device="cpu", dtype=torch.float16)


def test_mid_planes_show_the_head_up(tmp_path):
    from PIL import Image

    from meddiff.report import save_mid_planes

    data = np.zeros((8, 6, 4), np.float32)
    data[:, :, 3] = 1  # the top slice
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    save_mid_planes(Volume(data, affine, IntensityScale(0, 1)), tmp_path / "planes.png")
    image = np.asarray(Image.open(tmp_path / "planes.png"))
    assert image.shape == (8, 6 + 8 + 8 + 2 * 4)
    assert image[0, :6].min() > 200 and image[-1, :6].max() < 50
    assert image[0, 10:18].min() > 200 and image[-1, 10:18].max() < 50
