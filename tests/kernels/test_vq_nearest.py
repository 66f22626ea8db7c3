"""Nearest code against float64 brute force: exact equality, on every instruction set of this processor."""

from __future__ import annotations

import itertools

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meddiff.kernels.vq_nearest import vq_nearest, vq_nearest_ref

ISAS = torch.ops.meddiff.cpu_isas()


def brute_force(z: Tensor, codes: Tensor) -> Tensor:
    tokens = z.detach().double().movedim(1, -1).reshape(-1, z.shape[1]).numpy()
    distance = np.zeros((tokens.shape[0], codes.shape[0]))
    with np.errstate(all="ignore"):
        for token, code in zip(tokens.T, codes.detach().double().numpy().T):
            difference = token[:, None] - code
            distance += difference * difference
    index = np.where(np.isnan(distance), np.inf, distance).argmin(1)
    return torch.from_numpy(index).view(z.shape[0], *z.shape[2:])


def assert_exact(z: Tensor, codes: Tensor) -> None:
    expected = brute_force(z, codes)
    for isa in ISAS:
        got = torch.ops.meddiff._vq_nearest_isa(z, codes, isa)
        assert got.dtype == torch.int64 and got.is_contiguous()
        assert torch.equal(got, expected), isa
    assert torch.equal(vq_nearest(z, codes), expected)
    assert torch.equal(vq_nearest_ref(z, codes), expected)


def layouts(z: Tensor) -> dict[str, Tensor]:
    """Tensors of the shape of z with other strides, and other values where that cannot be helped."""
    holes = torch.full([2 * n + 1 for n in z.shape], torch.nan)[1::2, 1::2, 1::2, 1::2, 1::2]
    holes.copy_(z)
    return {
        "contiguous": z,
        "channels_last": z.contiguous(memory_format=torch.channels_last_3d),
        "sliced": holes,
        "permuted": z.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0),
        "expanded": z[:, :, :1, :, :1].expand(z.shape),
    }


@pytest.mark.parametrize("channels", [1, 3, 4, 8, 13, 16, 64])
@pytest.mark.parametrize("n_codes", [1, 2, 63, 64, 65, 1000])
def test_layouts_channels_and_codes(channels: int, n_codes: int):
    torch.manual_seed(channels * n_codes)
    codes = torch.randn(n_codes, channels)
    for z in layouts(torch.randn(2, channels, 3, 4, 3)).values():
        assert_exact(z, codes)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 31), (1, 32, 1), (11, 3, 1), (1, 1, 257)])
def test_token_counts_around_the_tile(shape: tuple[int, int, int]):
    torch.manual_seed(0)
    assert_exact(torch.randn(1, 8, *shape), torch.randn(100, 8))


@pytest.mark.parametrize("shape", [(0, 8, 2, 2, 2), (2, 8, 0, 3, 1), (1, 8, 1, 1, 0)])
def test_no_tokens(shape: tuple[int, ...]):
    index = vq_nearest(torch.zeros(shape), torch.zeros(3, 8))
    assert index.dtype == torch.int64 and index.shape == (shape[0], *shape[2:])
    assert torch.equal(index, vq_nearest_ref(torch.zeros(shape), torch.zeros(3, 8)))


def test_ties_give_the_lowest_index():
    torch.manual_seed(1)
    codes = torch.randn(40, 8).repeat(50, 1)[torch.randperm(2000)]
    assert_exact(torch.randn(1, 8, 5, 6, 7), codes)
    z = torch.ones(1, 8, 1, 1, 40)
    assert vq_nearest(z, torch.ones(500, 8)).eq(0).all()
    grid = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))  # the origin is as near to all of them
    assert vq_nearest(torch.zeros(1, 8, 1, 1, 40), grid).eq(0).all()
    assert_exact(torch.randint(-1, 2, (1, 8, 4, 5, 6)).float(), grid)


def test_differences_far_below_float32_rounding():
    torch.manual_seed(2)
    codes = torch.randn(30, 8).repeat_interleave(40, 0)
    codes *= 1 + torch.randint(-2, 3, codes.shape) * torch.finfo(torch.float32).eps
    z = torch.randn(1, 8, 6, 6, 6)
    assert_exact(z, codes)
    # the case must be hard: a plain float32 search has to fail it
    plain = torch.cdist(z.flatten(2)[0].T, codes).argmin(1)
    assert not torch.equal(plain.view(1, 6, 6, 6), brute_force(z, codes))


@pytest.mark.parametrize("channels", [3, 8])
def test_codes_far_from_the_origin(channels: int):
    torch.manual_seed(3)
    codes = 1000 + 0.01 * torch.randn(1000, channels)
    assert_exact(1000 + 0.01 * torch.randn(1, channels, 5, 6, 7), codes)
    assert_exact(torch.randn(1, channels, 2, 3, 4), codes)
    assert_exact(1e6 * torch.randn(1, channels, 2, 3, 4), codes)


@pytest.mark.parametrize("scale", [1e4, 1e18, 1e30, 3e38, 1e-18, 1e-30, 1e-42])
def test_extreme_scales(scale: float):
    torch.manual_seed(4)
    z, codes = torch.rand(1, 8, 4, 4, 4) - 0.5, torch.rand(200, 8) - 0.5
    assert_exact(scale * z, scale * codes)
    assert_exact(z, scale * codes)
    assert_exact(scale * z, codes)


def test_float32_scores_that_overflow():
    codes = torch.zeros(100, 8)
    codes[64:80, 0], codes[80:96, 0] = 3e19, -3e19  # half the square overflows: the nearest code scores −inf
    z = torch.zeros(1, 8, 1, 1, 3)
    z[0, 0, 0, 0] = torch.tensor([1e20, -1e20, 1.0])
    assert_exact(z, codes)
    assert vq_nearest(z, codes).flatten().tolist() == [64, 80, 0]


def test_nan_and_infinity():
    torch.manual_seed(5)
    z, codes = torch.randn(1, 8, 3, 4, 5), torch.randn(100, 8)
    z[0, 3, 0, 0, 0] = torch.nan
    z[0, :, 1, 1, 1] = torch.nan
    z[0, 5, 1, 2, 3] = torch.inf
    z[0, 0, 2, 2, 2] = -torch.inf
    assert_exact(z, codes)
    assert vq_nearest(z, codes)[0, (0, 1), (0, 1), (0, 1)].eq(0).all()
    codes[7, 2] = torch.nan
    codes[0] = torch.nan
    codes[50, 1] = torch.inf
    assert_exact(z, codes)
    assert_exact(z, torch.full((40, 8), torch.nan))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_float32(data: st.DataObject):
    channels = data.draw(st.integers(1, 9))
    values = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, 1 + 2**-23, 3e38, 1e-45])
    codes = torch.from_numpy(
        data.draw(hnp.arrays(np.float32, (data.draw(st.integers(1, 70)), channels), elements=values))
    )
    z = torch.from_numpy(data.draw(hnp.arrays(np.float32, (1, channels, 1, 2, 3), elements=values)))
    assert_exact(z, codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_as_float32(dtype: torch.dtype):
    torch.manual_seed(6)
    z, codes = torch.randn(2, 8, 3, 4, 5).to(dtype), torch.randn(300, 8)
    assert torch.equal(vq_nearest(z, codes), brute_force(z.float(), codes))
    assert torch.equal(vq_nearest(z, codes.to(dtype)), brute_force(z.float(), codes.to(dtype).float()))


def test_codes_need_not_be_contiguous():
    torch.manual_seed(7)
    z, codes = torch.randn(1, 8, 3, 4, 5), torch.randn(8, 600)
    assert_exact(z, codes.T[::2])


def test_every_index_is_written(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(8)
    z, codes = torch.randn(1, 8, 1, 7, 45), torch.randn(50, 8)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # fills new integer tensors with the largest value
    try:
        index = vq_nearest(z, codes)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(index, brute_force(z, codes))


def test_number_of_threads_does_not_matter():
    torch.manual_seed(9)
    z, codes = torch.randn(1, 8, 16, 16, 17), torch.randn(1000, 8)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(vq_nearest(z, codes))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(index, brute_force(z, codes)) for index in results)


def test_offsets_beyond_32_bits():
    far = 2**31 + 64
    memory = torch.empty(far + 64)  # 8 GiB of address space, of which a few pages are touched
    z = memory.as_strided((2, 8, 1, 2, 3), (far, 1, 0, 24, 8))
    torch.manual_seed(10)
    z.copy_(torch.randn(z.shape))
    assert_exact(z, torch.randn(100, 8))


def test_instruction_sets():
    assert ISAS[-1] == "portable" and set(ISAS) <= {"avx512", "avx2", "portable"}
    flags = torch.backends.cpu.get_cpu_capability()
    assert ("avx512" in ISAS) >= (flags == "AVX512")
    with pytest.raises(RuntimeError, match="_vq_nearest_isa: isa must be one of .* got sse9"):
        torch.ops.meddiff._vq_nearest_isa(torch.zeros(1, 8, 1, 1, 1), torch.zeros(1, 8), "sse9")


@pytest.mark.parametrize(
    ("z", "codes", "error", "message"),
    [
        (torch.zeros(8, 2, 2, 2), torch.zeros(4, 8), ValueError, r"z must be \[B, C, D, H, W\].*got \(8, 2, 2, 2\)"),
        (torch.zeros(1, 0, 2, 2, 2), torch.zeros(4, 0), ValueError, r"C >= 1, got \(1, 0, 2, 2, 2\)"),
        (torch.zeros(1, 8, 2, 2, 2), torch.zeros(4, 7), ValueError, r"codes must be \[K, 8\].*got \(4, 7\)"),
        (torch.zeros(1, 8, 2, 2, 2), torch.zeros(0, 8), ValueError, r"K >= 1, got \(0, 8\)"),
        (torch.zeros(1, 8, 2, 2, 2), torch.zeros(8), ValueError, r"codes must be \[K, 8\].*got \(8,\)"),
        (torch.zeros(1, 8, 2, 2, 2).double(), torch.zeros(4, 8), TypeError, "z must be float32.*got torch.float64"),
        (torch.zeros(1, 8, 2, 2, 2), torch.zeros(4, 8).int(), TypeError, "codes must be float32.*got torch.int32"),
        (torch.zeros(1, 8, 2, 2, 2), torch.zeros(4, 8, device="meta"), ValueError, "one device, got cpu and meta"),
    ],
)
def test_argument_errors(z: Tensor, codes: Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=f"vq_nearest: .*{message}"):
        vq_nearest(z, codes)


@pytest.mark.parametrize(
    ("z", "codes"),
    [
        (torch.zeros(8, 2, 2, 2), torch.zeros(4, 8)),
        (torch.zeros(1, 8, 2, 2, 2), torch.zeros(4, 7)),
        (torch.zeros(1, 8, 2, 2, 2), torch.zeros(0, 8)),
        (torch.zeros(1, 8, 2, 2, 2).double(), torch.zeros(4, 8)),
        (torch.zeros(1, 8, 2, 2, 2), torch.zeros(4, 8).int()),
    ],
)
def test_the_operator_itself_checks_too(z: Tensor, codes: Tensor):
    with pytest.raises(RuntimeError, match="vq_nearest: (z|codes) must be"):
        torch.ops.meddiff.vq_nearest(z, codes)


def test_opcheck():
    torch.manual_seed(11)
    codes = torch.randn(33, 8)
    for z in layouts(torch.randn(2, 8, 3, 4, 5)).values():
        torch.library.opcheck(torch.ops.meddiff.vq_nearest.default, (z, codes))
    with torch.enable_grad():
        z = torch.randn(1, 8, 2, 2, 2, requires_grad=True)
        torch.library.opcheck(torch.ops.meddiff.vq_nearest.default, (z, codes.requires_grad_()))


def test_compile_fullgraph():
    torch.manual_seed(12)
    compiled = torch.compile(vq_nearest, fullgraph=True, dynamic=True)
    codes = torch.randn(70, 8)
    for shape in ((1, 8, 2, 3, 4), (2, 8, 5, 4, 3)):
        for z in (torch.randn(shape), torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)):
            assert torch.equal(compiled(z, codes), brute_force(z, codes))


def test_the_index_carries_no_gradient():
    with torch.enable_grad():
        z = torch.randn(1, 8, 2, 2, 2, requires_grad=True)
        codes = torch.randn(5, 8, requires_grad=True)
        index = vq_nearest(z, codes)
        assert not index.requires_grad
        (codes[index].movedim(-1, 1) - z).square().sum().backward()
    assert torch.equal(z.grad, 2 * (z - codes[index].movedim(-1, 1)))
    assert torch.equal(codes.grad.ne(0).any(1), torch.bincount(index.flatten(), minlength=5) > 0)


def test_cuda_tensors_have_a_kernel():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("meddiff::vq_nearest", "CUDA")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 13, 16, 64])
@pytest.mark.parametrize("n_codes", [1, 65, 1000, 10000])
def test_cuda(channels: int, n_codes: int):
    torch.manual_seed(13)
    codes = torch.randn(n_codes, channels)
    codes[n_codes // 2 :] = codes[: n_codes - n_codes // 2].clone()
    z = torch.randn(2, channels, 3, 40, 5)
    z[0, :, 0, 0, 0], z[0, :, 0, 0, 1], z[0, :, 0, 0, 2] = torch.nan, torch.inf, 1e30
    for layout in layouts(z).values():
        assert torch.equal(vq_nearest(layout.cuda(), codes.cuda()).cpu(), brute_force(layout, codes))
