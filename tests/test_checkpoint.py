"""Model folders: what is saved comes back, nothing is lost on the way, and nothing damaged gets in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from meddiff import checkpoint
from meddiff.checkpoint import (
    CheckpointError,
    fingerprint,
    load_controlnet,
    load_model,
    save_controlnet,
    save_model,
    weights_sha256,
)
from meddiff.config import (
    ANATOMIES,
    PRESETS,
    ControlNetConfig,
    FastMRIConfig,
    MasksConfig,
    ScheduleConfig,
    SparseViewCTConfig,
)
from meddiff.models import BiFlowNet, ControlNet, PatchVolumeAutoencoder

TINY = PRESETS["tiny"]
MANIFEST = json.loads((Path(__file__).parent / "data" / "state_dict_manifest.json").read_text())


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return PatchVolumeAutoencoder(TINY.autoencoder).eval(), BiFlowNet(TINY.denoiser).eval()


@pytest.fixture(scope="module")
def pristine(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, *models, ScheduleConfig(timesteps=50))
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "model")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_saved_comes_back(models, pristine):
    loaded = load_model(pristine)
    assert fingerprint(loaded.autoencoder, loaded.denoiser) == fingerprint(*models)
    assert (loaded.schedule, loaded.path) == (ScheduleConfig(timesteps=50), pristine)
    assert loaded.autoencoder.config == TINY.autoencoder and loaded.denoiser.config == TINY.denoiser
    x = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(loaded.autoencoder.encode(x), models[0].encode(x), rtol=1e-5, atol=1e-5)
    z, t, y, resolution = torch.randn(1, 8, 8, 8, 8), torch.tensor([7]), torch.tensor([3]), torch.full((1, 3), 0.125)
    torch.testing.assert_close(
        loaded.denoiser(z, t, y, resolution), models[1](z, t, y, resolution), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_modules_are_ready_for_inference(models, pristine, dtype):
    loaded = load_model(str(pristine), "cpu", dtype)
    for module, original in zip((loaded.autoencoder, loaded.denoiser), models, strict=True):
        assert not any(m.training for m in module.modules())
        wanted = original.state_dict()
        for key, tensor in module.state_dict(keep_vars=True).items():
            assert not tensor.requires_grad
            assert tensor.dtype == (torch.float32 if key.startswith("codebook.") else dtype), key
            assert torch.equal(tensor, wanted[key].to(tensor.dtype)), key
            assert tensor.ndim != 5 or tensor.is_contiguous(memory_format=torch.channels_last_3d), key


def test_a_bfloat16_model_keeps_its_dtype_on_disk(pristine, tmp_path):
    loaded = load_model(pristine, dtype=torch.bfloat16)
    save_model(tmp_path / "half", loaded.autoencoder, loaded.denoiser, loaded.schedule)
    stored = load_file(tmp_path / "half" / "autoencoder" / "model.safetensors")
    assert stored["encoder.conv_first.weight"].dtype == torch.bfloat16
    assert stored["codebook.embeddings"].dtype == torch.float32
    again = load_model(tmp_path / "half", dtype=torch.bfloat16)
    assert fingerprint(again.autoencoder, again.denoiser) == fingerprint(loaded.autoencoder, loaded.denoiser)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_other_dtypes_are_type_errors(pristine, dtype):
    with pytest.raises(TypeError, match=f"load_model: dtype on cpu must be one of .*got {dtype}"):
        load_model(pristine, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float16_on_cuda(models, pristine):
    loaded = load_model(pristine, "cuda", torch.float16)
    weight = loaded.denoiser.init_conv.weight
    assert (weight.device.type, weight.dtype) == ("cuda", torch.float16)
    assert loaded.autoencoder.codebook.embeddings.dtype == torch.float32
    on_gpu = load_model(pristine, "cuda")
    assert fingerprint(on_gpu.autoencoder, on_gpu.denoiser) == fingerprint(*models)


def test_fingerprint_sees_values_and_nothing_else():
    torch.manual_seed(0)
    a, b = torch.nn.Conv3d(3, 4, 2), torch.nn.Conv3d(3, 4, 2)
    a.weight.data[0, 0, 0, 0, 0] = 0.0
    reference = fingerprint(a, b)
    assert reference == fingerprint(a.to(memory_format=torch.channels_last_3d), b) and len(reference) == 64
    assert reference != fingerprint(b, a)
    assert fingerprint(a) != fingerprint(a.bfloat16())
    a.float().weight[0, 0, 0, 0, 0] = -0.0
    assert reference != fingerprint(a, b)
    flat = torch.nn.Linear(2, 3, bias=False)
    turned = torch.nn.Linear(3, 2, bias=False)
    turned.weight.data = flat.weight.detach().reshape(2, 3)
    assert fingerprint(flat) != fingerprint(turned)


def _json(file: str, **changes):
    def damage(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _text(file: str, text: str):
    return lambda folder: (folder / file).write_text(text)


def _tensor(key: str, change):
    """Replaces a tensor of the denoiser, removes it (None) or adds it."""

    def damage(folder: Path) -> None:
        path = folder / "denoiser" / "model.safetensors"
        state = load_file(path)
        new = change(state.pop(key, None))
        save_file(state if new is None else {**state, key: new}, path)

    return damage


def _bytes(change):
    def damage(folder: Path) -> None:
        path = folder / "denoiser" / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def _poison(value: float):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


DAMAGE = {
    "no folder config": (lambda f: (f / "config.json").unlink(), "model/config.json: missing"),
    "no component config": (lambda f: (f / "denoiser/config.json").unlink(), "denoiser/config.json: missing"),
    "no weights": (lambda f: (f / "autoencoder/model.safetensors").unlink(), "autoencoder/model.safetensors: missing"),
    "invalid JSON": (_text("denoiser/config.json", '{"dim": 24'), "denoiser/config.json: not readable as JSON"),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json: not readable as JSON"),
    "deep JSON": (_text("config.json", "[" * 100_000), "config.json: not readable as JSON"),
    "huge JSON": (_text("config.json", " " * 2_000_000 + "{}"), "larger than"),
    "JSON list": (_text("autoencoder/config.json", "[]"), "autoencoder/config.json: must hold a JSON object, got list"),
    "other format": (_json("config.json", format="diffusers"), "format must be 'meddiff', got 'diffusers'"),
    "newer version": (_json("config.json", version=2), "version 2 is newer .* upgrade"),
    "version is a string": (_json("config.json", version="1"), "version must be a positive integer, got '1'"),
    "unknown top field": (_json("config.json", surprise=1), r"config.json: unknown fields \['surprise'\]"),
    "path traversal": (_json("config.json", components=["autoencoder", "../../etc"]), "components must be .*etc"),
    "component missing": (_json("config.json", components=["autoencoder"]), "components must be"),
    "no schedule": (_json("config.json", schedule=None), "config.json: ScheduleConfig: expected a JSON object"),
    "bad schedule": (
        _json("config.json", schedule={"timesteps": -1}),
        "ScheduleConfig: timesteps must be",
    ),
    "unknown field": (_json("denoiser/config.json", width=3), r"denoiser/config.json: .*unknown fields \['width'\]"),
    "wrong type": (_json("denoiser/config.json", dim="24"), "denoiser/config.json: .*dim must be a positive integer"),
    "wrong container": (_json("denoiser/config.json", dim_mults=5), "denoiser/config.json"),
    "other latent": (_json("autoencoder/config.json", embedding_dim=4), "do not belong together: .*embedding_dim 4"),
    "a billion blocks": (_json("denoiser/config.json", mid_blocks=10**9), "describes 1000000004 blocks"),
    "too wide": (_json("autoencoder/config.json", n_codes=10**30), "no module can be built"),
    "too deep": (_json("autoencoder/config.json", downsample=2**90, patch_size=2**90), "no module can be built"),
    "other config": (
        _json("denoiser/config.json", num_classes=3),
        "1 wrong shapes: 'cond_emb.weight' is .7, 96.",
    ),
    "empty weights": (_bytes(lambda b: b""), "denoiser/model.safetensors: not a whole safetensors file"),
    "huge header": (_bytes(lambda b: (2**60).to_bytes(8, "little") + b[8:]), "not a whole safetensors file"),
    "header cut": (_bytes(lambda b: b[:100]), "not a whole safetensors file"),
    "data cut": (_bytes(lambda b: b[:-4]), "not a whole safetensors file"),
    "data appended": (_bytes(lambda b: b + b"\0\0\0\0"), "not a whole safetensors file"),
    "header not JSON": (_bytes(lambda b: b[:8] + b"\xff" + b[9:]), "not a whole safetensors file"),
    "unknown key": (_tensor("evil.weight", lambda _: torch.ones(2)), "1 unknown keys: 'evil.weight'"),
    "missing key": (_tensor("init_conv.bias", lambda _: None), "1 missing keys: 'init_conv.bias'"),
    "wrong shape": (
        _tensor("init_conv.bias", lambda _: torch.ones(7)),
        r"'init_conv.bias' is \(7,\) and should",
    ),
    "integers": (_tensor("init_conv.bias", lambda t: t.int()), "1 dtypes not among .*: 'init_conv.bias' is I32"),
    "doubles": (_tensor("init_conv.bias", lambda t: t.double()), "'init_conv.bias' is F64"),
    "NaN": (_tensor("final_conv.1.weight", _poison(torch.nan)), "model.safetensors: 'final_conv.1.weight' holds NaN"),
    "inf": (_tensor("final_conv.1.weight", _poison(-torch.inf)), "model.safetensors: 'final_conv.1.weight' holds NaN"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_folders_are_refused_by_name(folder, name):
    damage, message = DAMAGE[name]
    damage(folder)
    before = contents(folder.parent)
    with pytest.raises(CheckpointError, match=f"(?s).*{message}"):
        load_model(folder)
    assert contents(folder.parent) == before


def test_overflow_of_the_wanted_dtype_is_found(folder):
    _tensor("init_conv.bias", _poison(3.4e38))(folder)
    load_model(folder)
    with pytest.raises(CheckpointError, match=r"'init_conv.bias' holds NaN or inf \(as torch.bfloat16\)"):
        load_model(folder, dtype=torch.bfloat16)


def test_many_keys_are_counted_and_the_first_ones_named(folder):
    path = folder / "denoiser" / "model.safetensors"
    save_file({f"module.{key}": tensor for key, tensor in load_file(path).items()}, path)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    total = len(BiFlowNet(TINY.denoiser).state_dict())
    assert f"{total} missing keys: 'pos_embed'" in str(caught.value)
    assert f"{total} unknown keys: 'module." in str(caught.value) and f"and {total - 5} more" in str(caught.value)


def test_a_folder_is_replaced_whole(models, folder):
    other = PatchVolumeAutoencoder(TINY.autoencoder)
    (folder / "conversion.json").write_text("{}")
    save_model(folder, other, models[1], TINY.schedule)
    assert fingerprint(load_model(folder).autoencoder) == fingerprint(other)
    assert not (folder / "conversion.json").exists(), "the report of other weights stayed"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", ["second component", "configuration", "last rename"])
def test_a_failed_save_loses_nothing(models, folder, monkeypatch, failing):
    def fail_at(original, when):
        def wrapper(*args, **kwargs):
            if when(*args):
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        return wrapper

    if failing == "second component":
        broken = fail_at(checkpoint.save_file, lambda state, *_: "pos_embed" in state)
        monkeypatch.setattr(checkpoint, "save_file", broken)
    elif failing == "configuration":
        monkeypatch.setattr(checkpoint, "write_json", fail_at(checkpoint.write_json, lambda path, _: "format" in _))
    else:
        monkeypatch.setattr(Path, "rename", fail_at(Path.rename, lambda _, to: to == folder and _.suffix != ".old"))
    before = contents(folder.parent)
    with pytest.raises(OSError, match="No space"):
        save_model(folder, PatchVolumeAutoencoder(TINY.autoencoder), models[1], TINY.schedule)
    assert contents(folder.parent) == before
    new = folder.with_name("new")
    if failing != "last rename":
        with pytest.raises(OSError, match="No space"):
            save_model(new, *models, TINY.schedule)
        assert not new.exists() and contents(folder.parent) == before


def test_other_peoples_folders_are_not_replaced(models, folder, tmp_path):
    (folder / "autoencoder" / "notes.txt").write_text("mine")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"format": "diffusers"}')
    file = tmp_path / "file"
    file.write_text("mine")
    before = contents(tmp_path)
    for target, message in ((folder, "also holds autoencoder/notes.txt"), (foreign, "no meddiff"), (file, "is a file")):
        with pytest.raises(CheckpointError, match=message):
            save_model(target, *models, TINY.schedule)
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", *models, TINY.schedule)
    load_model(tmp_path / "empty")


def test_a_broken_network_is_not_saved(models, folder):
    broken = PatchVolumeAutoencoder(TINY.autoencoder)
    broken.decoder.conv_first.bias.data[0] = torch.nan
    before = contents(folder.parent)
    with pytest.raises(CheckpointError, match="autoencoder.*'decoder.conv_first.bias' holds NaN"):
        save_model(folder, broken, models[1], TINY.schedule)
    assert contents(folder.parent) == before


def test_hub_ids(models, folder, monkeypatch, tmp_path):
    calls = []

    def snapshot_download(repo_id, **kwargs):
        calls.append((repo_id, kwargs))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert fingerprint(load_model("someone/med-diff.v1@main").denoiser) == fingerprint(models[1])
    repo, options = calls.pop()
    assert (repo, options["revision"]) == ("someone/med-diff.v1", "main")
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in options["allow_patterns"])
    load_model("someone/model")
    assert calls.pop()[1]["revision"] is None
    shutil.copytree(folder, tmp_path / "someone" / "model")
    assert load_model("someone/model").path == Path("someone/model")
    for bad in ("no/such/folder", "nothing", "../evil", "/absolute/path", "someone/model@", "some/../one"):
        with pytest.raises(CheckpointError, match="no folder .* and it is no hub id either"):
            load_model(bad)
    assert not calls


def test_a_failed_download_says_both_things_that_were_tried(monkeypatch, tmp_path):
    def snapshot_download(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no folder 'someone/model', and no download from the hub: offline"):
        load_model("someone/model")


@pytest.mark.parametrize("preset", ["8x", "4x"])
def test_released_shapes_imply_the_released_configurations(preset):
    shapes = {name: MANIFEST[f"{name}_{preset}"] for name in ("patchvolume", "biflownet")}
    assert checkpoint.infer_autoencoder_config(shapes["patchvolume"]) == PRESETS[preset].autoencoder
    assert checkpoint.infer_denoiser_config(shapes["biflownet"]) == PRESETS[preset].denoiser


def test_shapes_imply_every_field_that_leaves_a_trace():
    fields = {"dim": 48, "dim_mults": (1, 1, 3), "channels": 4, "num_classes": 3, "sub_volume": 12, "token_patch": 2}
    config = type(TINY.denoiser)(**fields, mlp_ratio=2, mid_blocks=3, attention_levels=2)
    shapes = {key: tensor.shape for key, tensor in checkpoint.build_empty("denoiser", config).state_dict().items()}
    assert checkpoint.infer_denoiser_config(shapes) == config
    config = type(TINY.autoencoder)(24, 8, 4, 32, downsample=2, patch_size=32, image_channels=2)
    shapes = {key: tensor.shape for key, tensor in checkpoint.build_empty("autoencoder", config).state_dict().items()}
    assert checkpoint.infer_autoencoder_config(shapes, num_groups=8, patch_size=32) == config


@pytest.fixture(scope="module")
def controlnet(models):
    return ControlNet.from_denoiser(models[1], ControlNetConfig(denoiser=TINY.denoiser))


T1 = {"mr_t1_brain": ANATOMIES["mr_t1_brain"]}


@pytest.fixture(scope="module")
def pristine_controlnet(controlnet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls") / "control"
    save_controlnet(folder, controlnet, FastMRIConfig(acceleration=8), "some/base", "0" * 64, T1)
    return folder


@pytest.fixture
def control_folder(pristine_controlnet, tmp_path):
    return shutil.copytree(pristine_controlnet, tmp_path / "control")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_controlnet_comes_back_with_its_task_and_its_base(controlnet, pristine_controlnet, dtype):
    loaded = load_controlnet(pristine_controlnet, dtype=dtype)
    assert (loaded.task, loaded.base, loaded.base_sha256) == (FastMRIConfig(acceleration=8), "some/base", "0" * 64)
    assert loaded.anatomies == T1 and loaded.network.control_config == controlnet.control_config
    wanted = controlnet.state_dict()
    for key, tensor in loaded.network.state_dict(keep_vars=True).items():
        assert not tensor.requires_grad and torch.equal(tensor, wanted[key].to(dtype)), key
        assert tensor.ndim != 5 or tensor.is_contiguous(memory_format=torch.channels_last_3d), key
    size = sum(path.stat().st_size for path in pristine_controlnet.iterdir())
    assert size < 1.05 * sum(4 * tensor.numel() for tensor in wanted.values()), "something of the base was stored"


@pytest.mark.parametrize(
    "task, changes",
    [
        (MasksConfig(means=(-1, -0.5, 0, 0.5)), {"encoder": "convolutional", "channels": 4, "widths": (2, 3)}),
        (SparseViewCTConfig(views=9), {"encoder": "convolutional", "channels": 1, "copied": ("down_path",)}),
    ],
)
def test_other_tasks_and_other_copies(models, tmp_path, task, changes):
    if "copied" in changes:
        changes = changes | {"enters": ("latent",)}
    config = ControlNetConfig(denoiser=TINY.denoiser, **changes)
    network = ControlNet.from_denoiser(models[1], config)
    save_controlnet(tmp_path / "control", network, task, "base", "f" * 64, T1)
    loaded = load_controlnet(tmp_path / "control")
    assert loaded.task == task and loaded.network.control_config == config
    assert fingerprint(loaded.network) == fingerprint(network)


def _network(**changes):
    def damage(folder: Path) -> None:
        network = json.loads((folder / "config.json").read_text())["network"]
        _json("config.json", network=network | changes)(folder)

    return damage


def _of_controlnet(damage):
    """Damage to the denoiser's file, done to the ControlNet's."""

    def moved(folder: Path) -> None:
        (folder / "denoiser").mkdir()
        (folder / "model.safetensors").rename(folder / "denoiser" / "model.safetensors")
        damage(folder)
        (folder / "denoiser" / "model.safetensors").rename(folder / "model.safetensors")
        (folder / "denoiser").rmdir()

    return moved


CONTROL_DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "control/config.json: missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "control/model.safetensors: missing"),
    "a model": (_json("config.json", format="meddiff"), "format must be 'meddiff-controlnet', got 'meddiff'"),
    "newer version": (_json("config.json", version=2), "version 2 is newer"),
    "unknown field": (_json("config.json", evil=1), "fields must be .*got .*evil"),
    "no base": (_json("config.json", base="somewhere"), "base must hold source and sha256"),
    "no hash": (_json("config.json", base={"source": "a", "sha256": "b"}), "base must hold source and sha256"),
    "unknown task": (_json("config.json", task={"name": "magic"}), "name must be one of .*got 'magic'"),
    "task is a list": (_json("config.json", task=[]), "name must be one of"),
    "bad task": (_json("config.json", task={"name": "fast_mri", "acceleration": -1}), "acceleration must be a pos"),
    "other encoder": (_network(encoder="convolutional"), "the task's condition has 1 channels, and the network 8"),
    "bad anatomies": (_json("config.json", anatomies={"hand": []}), "unknown names .'hand'"),
    "network is a number": (_json("config.json", network=3), "ControlNetConfig: expected a JSON object"),
    "denoiser is a list": (_network(denoiser=[1]), "DenoiserConfig: expected a JSON object"),
    "unknown block": (_network(copied=["up_path"]), "copied must be one or more of"),
    "copied is nested": (_network(copied=[["down_path"]]), "config.json"),
    "enters nowhere": (_network(copied=["intra_patch"]), "'down_path' must be copied"),
    "other channels": (_network(channels=4), "the task's condition has 8 channels, and the network 4"),
    "a billion blocks": (_network(denoiser={"mid_blocks": 10**9, "dim": 24}), "describes 1000000008 blocks"),
    "too wide": (_network(denoiser={"dim": 24 * 10**15, "dim_mults": [1, 1, 2, 4]}), "no module can be built"),
    "wider": (_network(denoiser={"dim": 48, "dim_mults": [1, 1, 2, 4]}), "wrong shapes"),
    "data cut": (_of_controlnet(_bytes(lambda b: b[:-4])), "not a whole safetensors file"),
    "huge header": (_of_controlnet(_bytes(lambda b: (2**60).to_bytes(8, "little") + b[8:])), "not a whole"),
    "missing key": (_of_controlnet(_tensor("exits.middle.bias", lambda _: None)), "missing keys: 'exits.middle.bias'"),
    "unknown key": (_of_controlnet(_tensor("evil", lambda _: torch.ones(2))), "1 unknown keys: 'evil'"),
    "NaN": (_of_controlnet(_tensor("init_conv.weight", _poison(torch.nan))), "'init_conv.weight' holds NaN"),
}


@pytest.mark.parametrize("name", CONTROL_DAMAGE)
def test_bad_controlnets_are_refused_by_name(control_folder, name):
    damage, message = CONTROL_DAMAGE[name]
    damage(control_folder)
    with pytest.raises(CheckpointError, match=f"(?s).*({message})"):
        load_controlnet(control_folder)


def test_controlnets_replace_only_their_kind(controlnet, control_folder, folder):
    def save(target):
        save_controlnet(target, controlnet, FastMRIConfig(), "base", "0" * 64, T1)

    save(control_folder)
    assert load_controlnet(control_folder).task == FastMRIConfig()
    assert [path.name for path in control_folder.parent.iterdir() if path.name.startswith(".")] == []
    before = contents(folder)
    for target in (folder, folder / "denoiser"):
        with pytest.raises(CheckpointError, match="will not be replaced"):
            save(target)
    assert contents(folder) == before


def test_the_hash_of_a_models_files_sees_every_component(models, folder):
    first = weights_sha256(folder)
    assert len(first) == 64 and weights_sha256(folder) == first
    seen = {first}
    for component in ("autoencoder", "denoiser"):
        state = load_file(folder / component / "model.safetensors")
        next(iter(state.values())).view(-1)[0] += 1
        save_file(state, folder / component / "model.safetensors")
        seen.add(weights_sha256(folder))
    assert len(seen) == 3
    (folder / "denoiser" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="denoiser/model.safetensors: not readable"):
        weights_sha256(folder)
