#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "vq_nearest.h"
#include "vq_nearest_check.h"

namespace meddiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor vq_nearest(const Tensor& z, const Tensor& codes_in) {
  check_vq_nearest(z, codes_in);
  Tensor index = torch::stable::new_empty(z, {z.size(0), z.size(2), z.size(3), z.size(4)}, ScalarType::Long);
  if (index.numel() == 0) return index;

  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  const Tensor codes = torch::stable::contiguous(codes_in);
  const Tensor workspace = torch::stable::new_empty(z, {vq_nearest_cuda_workspace(z.size(1), codes.size(0))});
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(z.get_device_index(), &stream));
  const int error = vq_nearest_cuda(z.const_data_ptr<float>(), z.sizes().data(), z.strides().data(),
                                    codes.const_data_ptr<float>(), codes.size(0), workspace.mutable_data_ptr<float>(),
                                    index.mutable_data_ptr<int64_t>(), stream);
  STD_TORCH_CHECK(error == cudaSuccess, "vq_nearest: CUDA launch failed: ",
                  cudaGetErrorString(static_cast<cudaError_t>(error)));
  return index;
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CUDA, m) { m.impl("vq_nearest", TORCH_BOX(&meddiff::vq_nearest)); }
