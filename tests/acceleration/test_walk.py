"""Walking, undoing, wrapping, copying: nothing but methods of instances changes."""

from __future__ import annotations

import copy
import io
import socket
import threading

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vector_quantize_pytorch import VectorQuantize

import meddiff
from meddiff.models import PatchVolumeAutoencoder


def test_what_it_takes():
    with pytest.raises(TypeError, match="torch.nn.Module, got list"):
        meddiff.accelerate([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="positive number of bytes, got 0"):
        meddiff.accelerate(nn.Linear(2, 2), memory_budget=0)


def test_nothing_known_is_one_line():
    report = meddiff.accelerate(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    assert [(row.path, row.by, row.note) for row in report.rows] == [("", None, "no structure that meddiff knows")]


def test_meddiffs_own_models_are_left(tiny_autoencoder_config):
    model = PatchVolumeAutoencoder(tiny_autoencoder_config)
    assert meddiff.accelerate(model).left[0].note == "it is meddiff's own"


def test_weights_are_untouched_and_restoring_leaves_no_trace(autoencoder):
    before = {name: (id(tensor), tensor.clone()) for name, tensor in autoencoder.state_dict(keep_vars=True).items()}
    attributes = {path: set(module.__dict__) for path, module in autoencoder.named_modules()}
    state = torch.get_rng_state()
    meddiff.accelerate(autoencoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert {path for path, _ in autoencoder.named_modules()} == attributes.keys()
    after = autoencoder.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (identity, values) in before.items():
        assert id(after[name]) == identity and torch.equal(after[name], values)
    meddiff.accelerate(autoencoder)  # once more is the same
    meddiff.restore(autoencoder)
    assert {path: set(module.__dict__) for path, module in autoencoder.named_modules()} == attributes
    meddiff.restore(autoencoder)


def test_other_instances_are_untouched(autoencoder, published):
    meddiff.accelerate(autoencoder)
    other = published.Autoencoder(autoencoder.config)
    assert (
        "forward" not in other.decoder.__dict__ and type(other).decode_sliding is published.Autoencoder.decode_sliding
    )


def test_shared_modules_are_replaced_once():
    quantizer = VectorQuantize(dim=4, codebook_size=10).eval()
    report = meddiff.accelerate(nn.ModuleList([quantizer, quantizer]))
    assert [row.path for row in report.rows] == ["0"]


def test_copies_are_accelerated_and_independent(autoencoder, relative_error):
    z = torch.randn(1, 8, 2, 2, 2)
    meddiff.accelerate(autoencoder)
    wanted, twin = autoencoder.decoder(z), copy.deepcopy(autoencoder)
    assert torch.equal(twin.decoder(z), wanted)
    twin.decoder.conv_first.weight.mul_(2)
    assert relative_error(twin.decoder(z), wanted) > 1e-2
    assert torch.equal(autoencoder.decoder(z), wanted)
    meddiff.restore(twin)
    assert "forward" not in twin.decoder.__dict__ and "forward" in autoencoder.decoder.__dict__


def test_saved_whole_and_loaded():
    module, z = VectorQuantize(dim=8, codebook_size=20, accept_3d_fmap=True).eval(), torch.randn(1, 8, 3, 3, 3)
    meddiff.accelerate(module)
    wanted, file = module(z)[0], io.BytesIO()
    torch.save(module, file)
    twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert "forward" in twin.__dict__ and torch.equal(twin(z)[0], wanted)
    twin._codebook.embed.add_(1)
    assert not torch.equal(twin(z)[0], wanted) and torch.equal(module(z)[0], wanted)


def test_wrapped_before_is_left_and_wrapped_after_is_not_undone():
    module = VectorQuantize(dim=4, codebook_size=10).eval()
    plain = module.forward
    module.forward = lambda x: plain(x)
    report = meddiff.accelerate(module)
    assert not report.replaced and "before wrapping" in report.left[0].note
    del module.forward
    meddiff.accelerate(module)
    fast = module.forward
    module.forward = lambda x: fast(x)
    with pytest.raises(RuntimeError, match="replaced again after accelerate"):
        meddiff.restore(module)


def test_distributed_data_parallel(denoiser, relative_error):
    """Wrapped before or after, and its gradient is that of the plain one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        x, time, y, res = torch.randn(1, 8, 8, 8, 8), torch.tensor([7]), torch.tensor([1]), torch.full((1, 3), 0.125)
        wanted = denoiser(x, time, y=y, res=res)
        with torch.enable_grad():
            wrapped = DistributedDataParallel(denoiser)
            report = meddiff.accelerate(wrapped)
            assert [row.path for row in report.replaced] == ["module"]
            out = wrapped(x, time, y=y, res=res)
            out.square().mean().backward()
        assert relative_error(out, wanted) < 1e-5
        assert all(p.grad is not None for p in denoiser.parameters() if p.requires_grad)
    finally:
        dist.destroy_process_group()


def test_prepared_by_accelerate():
    module, x = VectorQuantize(dim=8, codebook_size=50).eval(), torch.randn(2, 40, 8)
    wanted = module(x)[1]
    meddiff.accelerate(module)
    try:
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(module, evaluation_mode=True)
        assert torch.equal(prepared(x)[1], wanted)
        report = meddiff.accelerate(Accelerator(cpu=True).prepare_model(VectorQuantize(dim=8, codebook_size=50).eval()))
        assert not report.replaced and "before wrapping" in report.left[0].note
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_threads_share_nothing():
    torch.manual_seed(0)
    modules = [VectorQuantize(dim=8, codebook_size=50 + i, accept_3d_fmap=True).eval() for i in range(2)]
    inputs = [torch.randn(1, 8, 4, 4, 4 + i) for i in range(4)]
    wanted = [[module(x)[1] for x in inputs] for module in modules]
    for module in modules:
        meddiff.accelerate(module)
    wrong: list[tuple[int, int]] = []

    def work(i: int) -> None:
        for _ in range(5):
            for m, module in enumerate(modules):
                if not torch.equal(module(inputs[i])[1], wanted[m][i]):
                    wrong.append((m, i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_compiled_around(autoencoder):
    z = torch.randn(1, 8, 2, 3, 2)
    wanted = autoencoder.codebook(z)
    meddiff.accelerate(autoencoder)
    compiled = torch.compile(autoencoder.codebook, backend="aot_eager")
    got = compiled(z)
    assert torch.equal(got["encodings"], wanted["encodings"])
    torch.testing.assert_close(got["embeddings"], wanted["embeddings"])
