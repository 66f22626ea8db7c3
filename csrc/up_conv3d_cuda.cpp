// up_conv3d on the GPU.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "conv3d_check.h"
#include "conv3d_cuda.h"

namespace meddiff {
namespace {

void up_conv3d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const std::vector<int64_t>& pads,
               const Tensor& out, const OptionalTensor& statistics) {
  ConvArguments arguments("up_conv3d", x, weight, pads, out);
  ConvProblem& p = arguments.problem;
  const int64_t outputs = weight.size(1);
  STD_TORCH_CHECK(weight.size(0) == x.size(1) && weight.size(2) == 4 && weight.size(3) == 4 && weight.size(4) == 4,
                  "up_conv3d: weight must be [", x.size(1), ", O, 4, 4, 4], got [", weight.size(0), ", ", outputs, ", ",
                  weight.size(2), ", ", weight.size(3), ", ", weight.size(4), "]");
  p.transposed = true;
  arguments.check_output(outputs);
  p.bias = arguments.bias("bias", bias, outputs);
  arguments.statistics(statistics);
  if (out.numel() == 0) {
    if (statistics) torch::stable::zero_(const_cast<Tensor&>(*statistics));
    return;
  }

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor workspace = torch::stable::new_empty(x, {up_conv3d_cuda_workspace(p)}, ScalarType::Byte);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const int error = up_conv3d_cuda(p, workspace.mutable_data_ptr(), stream);
  STD_TORCH_CHECK(error == cudaSuccess, "up_conv3d: CUDA launch failed: ",
                  cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CUDA, m) { m.impl("up_conv3d", TORCH_BOX(&meddiff::up_conv3d)); }
