"""Released checkpoints become model folders, and nothing that a file asks for is ever run."""

from __future__ import annotations

import argparse
import contextlib
import copyreg
import functools
import json
import os
import pickle
import sys
import time
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from meddiff.checkpoint import CheckpointError, fingerprint, load_model
from meddiff.config import PRESETS, AutoencoderConfig
from meddiff.conversion import convert
from meddiff.models import BiFlowNet, PatchVolumeAutoencoder

TINY = PRESETS["tiny"]
EXTRA_WEIGHTS = {
    "volume_discriminator.model0.0.weight": torch.zeros(2, 1, 4, 4, 4),
    "volume_discriminator.model1.1.num_batches_tracked": torch.tensor(5),
    "perceptual_loss.net.slice1.0.weight": torch.zeros(3),
}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return PatchVolumeAutoencoder(TINY.autoencoder).eval(), BiFlowNet(TINY.denoiser).eval()


def _settings():
    omegaconf = pytest.importorskip("omegaconf")
    model = {"num_groups": 4, "downsample": [8, 8, 8], "patch_size": [16, 16, 16], "name": "${kind}"}
    return omegaconf.OmegaConf.create({"kind": "pv", "model": model, "nested": {"more": {"lr": 3e-4}}})


def _foreign_object(monkeypatch):
    """An instance of a class of a module that is gone by the time the file is read."""
    module = types.ModuleType("lightning_like")
    exec("class ModelCheckpoint:\n  def __setstate__(self, state): raise SystemExit('code was run')", module.__dict__)
    monkeypatch.setitem(sys.modules, "lightning_like", module)
    thing = module.ModelCheckpoint()
    thing.best, thing.itself = torch.ones(3), thing
    return thing


@pytest.fixture
def files(models, tmp_path, monkeypatch):
    """The two released files at a small size."""
    autoencoder, denoiser = (model.state_dict() for model in models)
    optimizer = {"state": defaultdict(dict, {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4)}})}
    lightning = {
        "epoch": 3,
        "pytorch-lightning_version": "1.9.0",
        "state_dict": OrderedDict(autoencoder | EXTRA_WEIGHTS),
        "hyper_parameters": {"cfg": _settings(), "val_dataloader": None},
        "optimizer_states": [optimizer],
        "callbacks": {"ModelCheckpoint": _foreign_object(monkeypatch), "score": np.float64(0.5), 3: {1, 2}},
    }
    training = {
        "ema": denoiser,
        "model": {key: tensor + 1 for key, tensor in denoiser.items()},
        "opt": optimizer,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(results=Path("somewhere"), dim=24),
        "epoch": 7,
    }
    torch.save(lightning, tmp_path / "autoencoder.ckpt")
    torch.save(training, tmp_path / "denoiser.pt")
    for module in [name for name in sys.modules if name.startswith("omegaconf")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "lightning_like")
    return tmp_path / "autoencoder.ckpt", tmp_path / "denoiser.pt", tmp_path / "out"


def refuses(message: str, autoencoder_file, denoiser_file, out, **overrides):
    with pytest.raises(CheckpointError, match=f"(?s){message}") as caught:
        convert(autoencoder_file, denoiser_file, out, **overrides)
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")], "left-overs"
    return caught.value


def test_released_files_convert_exactly(models, files):
    autoencoder_file, denoiser_file, out = files
    report = convert(autoencoder_file, denoiser_file, out)
    loaded = load_model(out)
    assert fingerprint(loaded.autoencoder, loaded.denoiser) == fingerprint(*models)
    assert loaded.autoencoder.config == TINY.autoencoder and loaded.denoiser.config == TINY.denoiser

    part = report.autoencoder
    assert set(part.taken) == set(models[0].state_dict())
    assert part.taken["encoder.conv_first.weight"] == "torch.float32 (8, 1, 3, 3, 3)"
    assert set(EXTRA_WEIGHTS) < set(part.skipped)
    assert part.skipped["volume_discriminator.model0.0.weight"] == "discriminator of the training"
    for tensor in ("exp_avg", "step", "best"):
        assert [reason for name, reason in part.skipped.items() if name.endswith(tensor)] == ["state of the training"]
    assert any("patch_size = 16" in note for note in part.notes)
    part = report.denoiser
    assert part.skipped["model/init_conv.weight"] == "weights before the moving average"
    assert not (part.missing or part.unexplained or report.autoencoder.missing or report.autoencoder.unexplained)
    assert json.loads((out / "conversion.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    summary = f"{len(part.taken)} taken, {len(part.skipped)} skipped, 0 missing, 0 unexplained"
    assert f"denoiser: 'denoiser.pt': {summary}" in str(report)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_format_of_torch_save(models, files, protocol, zipped):
    *_, out = files
    for file, model in zip(files, models, strict=False):
        parameters = {key: torch.nn.Parameter(tensor) for key, tensor in model.state_dict().items()}
        torch.save(parameters, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    convert(*files, autoencoder_config=TINY.autoencoder)
    loaded = load_model(out)
    assert fingerprint(loaded.autoencoder, loaded.denoiser) == fingerprint(*models)


def test_safetensors_prefixes_views_and_other_dtypes(models, files):
    autoencoder_file, denoiser_file, out = files
    half = {key: tensor.bfloat16().contiguous() for key, tensor in models[0].state_dict().items()}
    save_file(half | EXTRA_WEIGHTS, out.parent / "a.safetensors")
    state = models[1].state_dict()
    state["init_conv.weight"] = state["init_conv.weight"].to(memory_format=torch.channels_last_3d).double()
    shared = torch.cat([torch.full((7,), torch.nan), state["init_conv.bias"]])
    state["init_conv.bias"] = shared[7:]
    torch.save({"ema": {f"module.{key}": tensor for key, tensor in state.items()}}, denoiser_file)
    report = convert(out.parent / "a.safetensors", denoiser_file, out, autoencoder_config=TINY.autoencoder)
    loaded = load_model(out)
    assert fingerprint(loaded.denoiser) == fingerprint(models[1])
    assert any("'module.'" in note for note in report.denoiser.notes)
    assert report.denoiser.taken["init_conv.weight"].startswith("torch.float64")
    for key, tensor in loaded.autoencoder.state_dict().items():
        assert torch.equal(tensor, half[key].float()), key


@pytest.mark.parametrize(("said", "groups"), [(8, 8), (7, 24), (None, 24)])
def test_num_groups_is_the_files_own_where_that_is_possible(models, files, said, groups):
    config = AutoencoderConfig(n_hiddens=24, num_groups=groups, n_codes=16, downsample=2)
    state = PatchVolumeAutoencoder(config).state_dict()
    hyper_parameters = {"cfg": {"model": {} if said is None else {"num_groups": said}}}
    torch.save({"state_dict": state, "hyper_parameters": hyper_parameters}, files[0])
    report = convert(*files)
    assert report.autoencoder.config == config.to_dict()
    assert any("as released, because" in note for note in report.autoencoder.notes) == (said == 7)


def _with(key, value):
    return lambda state: state | {key: value}


BAD_WEIGHTS = {
    "missing": (lambda s: {k: t for k, t in s.items() if k != "init_conv.bias"}, "1 missing keys: 'init_conv.bias'"),
    "unknown": (_with("surprise", torch.ones(2)), "1 unknown keys: 'surprise'"),
    "shape": (_with("init_conv.bias", torch.ones(5)), r"'init_conv.bias' is \(5,\) and should be \(24,\)"),
    "integers": (_with("init_conv.bias", torch.ones(24).long()), "'init_conv.bias' is torch.int64"),
    "complex": (_with("init_conv.bias", torch.ones(24) * 1j), "'init_conv.bias' is None"),
    "NaN": (_with("final_conv.1.bias", torch.full((8,), torch.nan)), "'final_conv.1.bias' holds NaN or inf"),
    "not a tensor": (_with("init_conv.bias", [1.0] * 24), "1 entries .* no tensors: 'init_conv.bias'"),
    "not text": (_with(3, torch.ones(1)), "1 entries of the state dict are no tensors: '3'"),
    "other network": (lambda _: {"a": torch.ones(3)}, "no denoiser configuration.*KeyError.'init_conv.weight'"),
    "strange width": (_with("init_conv.weight", torch.ones(25, 8, 3, 3, 3)), "no denoiser configuration"),
    "empty": (lambda _: {}, "must be a state dict, or have one as 'ema'"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_unfit_weights_are_refused(models, files, name):
    change, message = BAD_WEIGHTS[name]
    torch.save({"ema": change(models[1].state_dict())}, files[1])
    error = refuses(f"denoiser.pt: .*{message}", *files)
    assert error.report.file == "denoiser.pt"
    assert error.report.missing == ["init_conv.bias"] or name != "missing"
    assert error.report.unexplained == ["surprise"] or name != "unknown"


def test_unfit_files_are_refused(models, files):
    autoencoder_file, denoiser_file, out = files
    refuses("denoiser.pt: must be a state dict, or have one as 'state_dict'", denoiser_file, autoencoder_file, out)
    torch.save({"ema": models[1].state_dict(), "buffer": {"x": torch.ones(3)}}, denoiser_file)
    error = refuses("1 unknown keys: 'buffer/x'", *files)
    assert error.report.unexplained == ["buffer/x"]
    torch.save({"state_dict": models[0].state_dict()}, out.parent / "a.ckpt")
    message = "a.ckpt: no autoencoder configuration follows .*n_hiddens 8 .*give autoencoder_config"
    refuses(message, out.parent / "a.ckpt", denoiser_file, out)
    torch.save({"model": models[1].state_dict(), "epoch": 3}, denoiser_file)
    refuses("denoiser.pt: must be a state dict, or have one as 'ema'", *files)
    narrow = BiFlowNet(type(TINY.denoiser)(24, (1, 1, 2), channels=4, attention_levels=1))
    torch.save(narrow.state_dict(), denoiser_file)
    refuses("do not belong together: .*embedding_dim 8 .*channels 4", *files)
    refuses("nowhere.pt: cannot be read", autoencoder_file, out.parent / "nowhere.pt", out)
    (out.parent / "folder" / "x").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="also holds x"):
        convert(*files[:2], out.parent / "folder")


class Call:
    """Pickles as a call of `function`, so that unpickling runs it."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __call__(self):
        """Unused; pickle wants callables that look the part."""

    def __reduce__(self):
        return self.reduced


class Setter:
    def __setstate__(self, state):
        state["marker"].touch()


def _attacks(marker: Path):
    command = f"open({str(marker)!r}, 'w')"
    payload = pickle.dumps(Call(eval, command))
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, command),
        "getattr": Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {marker}"),
        "partial": Call(functools.partial(eval, command)),
        "map": Call(list, Call(map, eval, [command])),
        "torch.load inside": Call(torch.storage._load_from_bytes, payload),
        "setstate": Call(Setter, state={"marker": marker}),
        "hub": Call(torch.hub.load, "owner/repository", "model"),
    }


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", _attacks(Path("marker")))
def test_no_code_in_a_file_is_run(models, tmp_path, name, protocol):
    marker, file = tmp_path / "marker", tmp_path / "a.ckpt"
    attack, weights = _attacks(marker)[name], models[0].state_dict()
    for content in (attack, {"state_dict": attack}, {"state_dict": weights | {"decoder.conv_first.bias": attack}}):
        torch.save(content, file, pickle_protocol=protocol)
        refuses("a.ckpt: ", file, tmp_path / "not reached", tmp_path / "out")
        assert not marker.exists()


def test_the_attacks_would_work_elsewhere(tmp_path):
    marker = tmp_path / "marker"
    for name, attack in _attacks(marker).items():
        if name != "hub":
            with contextlib.suppress(pickle.UnpicklingError, RuntimeError):
                pickle.loads(pickle.dumps(attack))
            assert marker.exists(), name
            marker.unlink()


@pytest.mark.parametrize("zipped", [True, False])
def test_attacks_beside_the_weights_are_inert(models, files, tmp_path, zipped):
    marker = tmp_path / "marker"
    attacks = list(_attacks(marker).values())
    content = {"ema": models[1].state_dict(), "args": attacks, "opt": {attack: 1 for attack in attacks}}
    torch.save(content, files[1], _use_new_zipfile_serialization=zipped)
    convert(*files)
    assert fingerprint(load_model(files[2]).denoiser) == fingerprint(models[1])
    assert not marker.exists()


def _zip(path: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return path


DEEP = b")" + b"\x85" * 100_000
NESTED_CALLS = b"cposix\nsystem\nq\x00" + b"h\x00" * 100_000 + b")\x81" + b"\x85\x81" * 100_000
LAUGHS = b")q\x00" + b"h\x00\x86q\x00" * 300
BAD_PICKLES = {
    "dotted name": (b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93\x8c\x09touch bad\x85R.", "must be a state dict"),
    "name not text": (b"\x80\x04K\x01K\x02\x93)R.", "cannot be read"),
    "extension code": (b"\x80\x02\x82\xf0)R.", "opcode EXT1"),
    "text persistent id": (b"\x80\x02Pmodule\n.", "opcode PERSID"),
    "container source": (b"\x80\x02(U\x06modulecos\nsystem\nU\x01aU\x01btQ.", "refers to a storage"),
    "out-of-band buffer": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "call of a number": (b"\x80\x02K\x01)R.", "calls what is no function"),
    "items for a number": (b"\x80\x02K\x01K\x02a.", "adds items to a int"),
    "deep key": (b"\x80\x02}" + DEEP + b"Ns.", "must be a state dict"),
    "deep value": (b"\x80\x02}U\x03opt" + DEEP + b"s.", "'opt' is nested more than"),
    "deep calls": (b"\x80\x02}U\x03opt" + NESTED_CALLS + b"s.", "'opt' is nested more than"),
    "exponential key": (b"\x80\x02}" + LAUGHS + b"Ns.", "must be a state dict"),
    "exponential value": (b"\x80\x02}U\x03opt" + LAUGHS + b"s.", "'opt' is nested more than"),
    "huge memo index": (b"\x80\x02Nr\xff\xff\xff\xff.", "must be a state dict"),
    "huge bytes": (b"\x80\x05\x96" + (1 << 62).to_bytes(8, "little") + b".", "cannot be read"),
    "huge number": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "cannot be read"),
    "nothing on the stack": (b"\x80\x02R.", "cannot be read"),
    "noise": (bytes(range(255, 0, -1)), "cannot be read"),
    "empty": (b"", "cannot be read"),
    "too long": (b"\x80\x02" + b"N0" * (9 << 20) + b".", "'data.pkl' is missing, compressed or not of its size"),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_pickle_tricks_end_quickly_in_an_error(tmp_path, monkeypatch, name):
    pickled, message = BAD_PICKLES[name]
    monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("os", "system"))
    started = time.perf_counter()
    zipped = _zip(tmp_path / "zip.ckpt", {"data.pkl": pickled})
    refuses(message, zipped, tmp_path / "not reached", tmp_path / "out")
    if name not in ("too long", "empty"):
        legacy = tmp_path / "legacy.ckpt"
        legacy.write_bytes(b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {})) + pickled)
        refuses("legacy.ckpt: ", legacy, tmp_path / "not reached", tmp_path / "out")
    assert time.perf_counter() - started < 15


def _tensor_file(path: Path, offset=0, shape=(8,), stride=(1,)) -> Path:
    """A file whose state dict has one tensor over a storage of eight; the defaults fit."""
    storage = torch.zeros(8)._typed_storage()
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, OrderedDict())
    torch.save({"state_dict": {"decoder.conv_first.bias": tensor}}, path)
    return path


BAD_TENSORS = {
    "offset": ({"offset": 1}, "reaches outside its storage of 8"),
    "stride": ({"stride": (2,)}, "reaches outside its storage of 8"),
    "shape": ({"shape": (9,)}, "reaches outside its storage of 8"),
    "negative offset": ({"offset": -1}, "reaches outside"),
    "negative stride": ({"stride": (-1,), "offset": 7}, "reaches outside"),
    "expanded": ({"shape": (1 << 40, 8), "stride": (0, 1)}, "reaches outside"),
    "overflow": ({"shape": (2, 1 << 62), "stride": (1 << 62, 4)}, "reaches outside"),
    "fractions": ({"shape": (8.0,)}, "reaches outside"),
    "lengths": ({"stride": (1, 1)}, "shape and stride disagree"),
    "dimensions": ({"shape": (1,) * 9, "stride": (1,) * 9}, "shape and stride disagree"),
    "list": ({"shape": [8]}, "1 entries of the state dict are no tensors"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_stay_inside_their_storages(tmp_path, name):
    change, message = BAD_TENSORS[name]
    good = _tensor_file(tmp_path / "a.ckpt")
    refuses("no autoencoder configuration follows", good, tmp_path / "not reached", tmp_path / "out")
    refuses(message, _tensor_file(tmp_path / "a.ckpt", **change), tmp_path / "not reached", tmp_path / "out")


@pytest.fixture
def saved(models, tmp_path):
    torch.save(models[0].state_dict(), tmp_path / "zip.ckpt")
    torch.save(models[0].state_dict(), tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    return tmp_path / "zip.ckpt", tmp_path / "legacy.ckpt", tmp_path / "not reached", tmp_path / "out"


def _refuses_tiny(message, *files):
    refuses(message, *files, autoencoder_config=TINY.autoencoder)


def test_damaged_archives(saved):
    file, _, *rest = saved
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    _zip(file, records)
    _refuses_tiny("not reached: cannot be read", file, *rest)
    _zip(file, records, zipfile.ZIP_DEFLATED)
    _refuses_tiny("zip.ckpt: .* is missing, compressed or not of its size", file, *rest)
    _zip(file, {name: data for name, data in records.items() if name != "data/0"})
    _refuses_tiny("zip.ckpt: record 'data/0' is missing, compressed or not of its size", file, *rest)
    for change, message in (
        ({"data/0": records["data/0"][:-4]}, "record 'data/0' is missing, compressed or not of its size"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"more/data.pkl": b"N."}, "2 data.pkl"),
    ):
        _zip(file, records | change)
        _refuses_tiny(f"zip.ckpt: .*{message}", file, *rest)
    position = whole.index(records["data/5"])
    for damaged in (whole[: len(whole) // 2], whole[:position] + b"\x55" + whole[position + 1 :], b"PK\x03\x04", b""):
        file.write_bytes(damaged)
        _refuses_tiny("zip.ckpt: cannot be read", file, *rest)


def test_damaged_legacy_files(saved, models):
    _, file, *rest = saved
    whole = file.read_bytes()
    _refuses_tiny("not reached: cannot be read", file, *rest)
    for damaged in (whole[:-100], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        _refuses_tiny("legacy.ckpt: (ends after|storage .* is not of its size)", file, *rest)
    bias = (8).to_bytes(8, "little") + models[0].pre_vq_conv.bias.detach().numpy().tobytes()
    file.write_bytes(whole.replace(bias, (1 << 60).to_bytes(8, "little") + bias[8:]))
    _refuses_tiny("legacy.ckpt: storage .* is not of its size", file, *rest)
    file.write_bytes(b"storages\0" + bytes(4096))
    _refuses_tiny("legacy.ckpt: cannot be read", file, *rest)
