// Tiles of a convolution on the CPU, row by row: the W voxels of one (D, H), channels-last, so that a row is a stream of
// the kernels of group_norm_silu.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "group_norm_silu.h"

namespace meddiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const GroupNormSiluKernels<float>& kernels_of(const GroupNormSiluIsa& isa, float) { return isa.float32; }
inline const GroupNormSiluKernels<uint16_t>& kernels_of(const GroupNormSiluIsa& isa, uint16_t) { return isa.bfloat16; }

// [B, C, D, H, W] of any strides along B, D and H; the voxels of a row are one behind the other.
struct Rows {
  int64_t size[5], stride[5];

  Rows(const char* op, const char* name, const Tensor& t, ScalarType type) {
    STD_TORCH_CHECK(t.dim() == 5, op, ": ", name, " must be [B, C, D, H, W], got ", t.dim(), " dimensions");
    STD_TORCH_CHECK(t.scalar_type() == type && (type == ScalarType::Float || type == ScalarType::BFloat16), op, ": ",
                    name, " must be float32 or bfloat16 like the other tensors, got ", t.scalar_type());
    for (int i = 0; i < 5; ++i) size[i] = t.size(i), stride[i] = t.stride(i);
    STD_TORCH_CHECK((size[1] == 1 || stride[1] == 1) && (size[4] == 1 || stride[4] == size[1]), op, ": ", name,
                    " must be channels-last, got strides ", stride[1], " of C and ", stride[4], " of W");
    stride[4] = size[1];
    for (const int i : {3, 2})  // PyTorch leaves the strides of axes of one voxel open
      if (size[i] == 1) stride[i] = size[i + 1] * stride[i + 1];
  }

  int64_t count() const { return size[0] * size[2] * size[3]; }
  int64_t numbers() const { return size[1] * size[4]; }  // of a row
  int64_t at(int64_t b, int64_t d, int64_t h) const { return b * stride[0] + d * stride[2] + h * stride[3]; }
  int64_t at(int64_t row) const {
    return at(row / (size[2] * size[3]), row / size[3] % size[2], row % size[3]);
  }
};

// scale and shift of one sample, or 1 and 0, repeated over a row of the kernels.
struct Fold {
  std::vector<float> centre, gain, offset;

  Fold(int64_t b, int64_t channels, int64_t width, const OptionalTensor& scale, const OptionalTensor& shift)
      : centre(width), gain(width, 1.0f), offset(width) {
    if (!scale) return;
    for (int64_t i = 0; i < width; ++i) {
      gain[i] = scale->const_data_ptr<float>()[b * channels + i % channels];
      offset[i] = shift->const_data_ptr<float>()[b * channels + i % channels];
    }
  }

  template <class T>
  void apply(const GroupNormSiluKernels<T>& kernels, const T* x, int64_t count, bool silu, T* y) const {
    const int64_t width = static_cast<int64_t>(gain.size()), whole = count / width * width;
    const GroupNormSiluFold fold{centre.data(), gain.data(), offset.data()};
    kernels.forward(x, whole / width, width, fold, silu, y);
    if (whole == count) return;
    std::vector<T> rest(width);
    std::copy(x + whole, x + count, rest.begin());
    kernels.forward(rest.data(), 1, width, fold, silu, rest.data());
    std::copy_n(rest.data(), count - whole, y + whole);
  }
};

}  // namespace meddiff
