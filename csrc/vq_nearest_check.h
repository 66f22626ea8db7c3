// What the operator wants of its tensors, on any device.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace meddiff {

inline void check_vq_nearest(const torch::stable::Tensor& z, const torch::stable::Tensor& codes) {
  constexpr auto kFloat = torch::headeronly::ScalarType::Float;
  STD_TORCH_CHECK(z.dim() == 5 && z.scalar_type() == kFloat && z.size(1) > 0,
                  "vq_nearest: z must be float32 [B, C, D, H, W] with C >= 1, got ", z.dim(), " dimensions of type ",
                  z.scalar_type());
  STD_TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == kFloat,
                  "vq_nearest: codes must be float32 [K, C], got ", codes.dim(), " dimensions of type ",
                  codes.scalar_type());
  STD_TORCH_CHECK(codes.size(0) > 0 && codes.size(1) == z.size(1), "vq_nearest: codes must be [K, ", z.size(1),
                  "] with K >= 1, got [", codes.size(0), ", ", codes.size(1), "]");
  STD_TORCH_CHECK(z.device() == codes.device(), "vq_nearest: z and codes must be on one device");
}

}  // namespace meddiff
