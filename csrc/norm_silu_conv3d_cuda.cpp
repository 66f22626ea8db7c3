// norm_silu_conv3d on the GPU, and _norm_silu_conv3d_wgmma, which is the same by the kernel for compute capability 9.0.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "conv3d_check.h"
#include "conv3d_cuda.h"

namespace meddiff {
namespace {

template <bool Wgmma>
void norm_silu_conv3d(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, bool silu,
                      bool upsample, const Tensor& weight, const OptionalTensor& bias,
                      const std::vector<int64_t>& pads, const OptionalTensor& residual,
                      const OptionalTensor& residual_weight, const OptionalTensor& residual_bias, const Tensor& out,
                      const OptionalTensor& statistics) {
  ConvArguments arguments("norm_silu_conv3d", x, weight, pads, out);
  ConvProblem& p = arguments.problem;
  const int64_t k = weight.size(2), outputs = weight.size(0);
  STD_TORCH_CHECK((k == 1 || k == 3) && weight.size(3) == k && weight.size(4) == k && weight.size(1) == x.size(1),
                  "norm_silu_conv3d: weight must be [O, ", x.size(1), ", k, k, k] with k = 1 or 3, got [", outputs,
                  ", ", weight.size(1), ", ", k, ", ", weight.size(3), ", ", weight.size(4), "]");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "norm_silu_conv3d: scale and shift go together");
  STD_TORCH_CHECK(residual || (!residual_weight && !residual_bias),
                  "norm_silu_conv3d: residual_weight and residual_bias need a residual");
  STD_TORCH_CHECK(residual_weight || !residual_bias, "norm_silu_conv3d: residual_bias needs a residual_weight");
  p.silu = silu;
  p.upsample = upsample;
  arguments.check_output(outputs);
  p.scale = arguments.modulation("scale", scale);
  p.shift = arguments.modulation("shift", shift);
  p.bias = arguments.bias("bias", bias, outputs);
  p.residual_bias = arguments.bias("residual_bias", residual_bias, outputs);
  if (residual) arguments.view("residual", *residual, p.residual);
  if (residual_weight) {
    arguments.view("residual_weight", *residual_weight, p.residual_weight);
    const auto& size = p.residual_weight.size;
    STD_TORCH_CHECK(size[0] == outputs && size[1] == residual->size(1) && size[2] * size[3] * size[4] == 1,
                    "norm_silu_conv3d: residual_weight must be [", outputs, ", ", residual->size(1),
                    ", 1, 1, 1], got [", size[0], ", ", size[1], ", ", size[2], ", ", size[3], ", ", size[4], "]");
  }
  for (int i = 0; residual && i < 5; ++i)
    STD_TORCH_CHECK((i == 1 && residual_weight) || residual->size(i) == out.size(i),
                    "norm_silu_conv3d: residual must have ", out.size(i), " along axis ", i, " like out, got ",
                    residual->size(i));
  arguments.statistics(statistics);
  if (out.numel() == 0) {
    if (statistics) torch::stable::zero_(const_cast<Tensor&>(*statistics));
    return;
  }

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (Wgmma) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index());
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.get_device_index());
    STD_TORCH_CHECK(major == 9 && minor == 0, "_norm_silu_conv3d_wgmma: the GPU must be of compute capability 9.0, ",
                    "got ", major, ".", minor, "; norm_silu_conv3d runs on it");
  }
  const int64_t bytes = Wgmma ? norm_silu_conv3d_wgmma_workspace(p) : norm_silu_conv3d_cuda_workspace(p);
  STD_TORCH_CHECK(!Wgmma || bytes > 0, "_norm_silu_conv3d_wgmma: weight must be [O, C, 3, 3, 3] and the tensors "
                  "channels-last bfloat16 or float16, with channels in multiples of 8; norm_silu_conv3d serves the rest");
  const Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const auto launch = Wgmma ? norm_silu_conv3d_wgmma : norm_silu_conv3d_cuda;
  const int error = launch(p, workspace.mutable_data_ptr(), stream);
  STD_TORCH_CHECK(error == cudaSuccess, "norm_silu_conv3d: CUDA launch failed: ",
                  cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CUDA, m) {
  m.impl("norm_silu_conv3d", TORCH_BOX(&meddiff::norm_silu_conv3d<false>));
  m.impl("_norm_silu_conv3d_wgmma", TORCH_BOX(&meddiff::norm_silu_conv3d<true>));
}
