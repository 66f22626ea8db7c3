// What stands before and behind a convolution on the CPU; the convolution itself is PyTorch's (oneDNN's). Both run over
// rows: the W voxels of one (D, H), channels-last, so that a row is a stream of the kernels of group_norm_silu.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "conv3d_rows.h"
#include "group_norm_silu.h"
#include "moments.h"

namespace meddiff {
namespace {

void conv_input(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, bool silu, bool upsample,
                const std::vector<int64_t>& skip, const std::vector<int64_t>& pads, const Tensor& out,
                const std::optional<std::string>& isa_name) {
  const char* op = "norm_silu_conv3d";
  const GroupNormSiluIsa& isa = find_group_norm_silu_isa(op, isa_name);
  const ScalarType type = out.scalar_type();
  const Rows from(op, "x", x, type), to(op, "out", out, type);
  STD_TORCH_CHECK(pads.size() == 6 && skip.size() == 3, "norm_silu_conv3d: pads must be 6 numbers and skip 3, got ",
                  pads.size(), " and ", skip.size());
  STD_TORCH_CHECK(from.size[0] == to.size[0] && from.size[1] == to.size[1],
                  "norm_silu_conv3d: x and the tile must have the same samples and channels");
  const int64_t zoom = upsample ? 2 : 1;
  for (int i = 0; i < 3; ++i) {
    const int64_t inside = to.size[2 + i] - pads[2 * i] - pads[2 * i + 1];
    STD_TORCH_CHECK(inside >= 0 && skip[i] >= 0 && skip[i] + inside <= zoom * from.size[2 + i],
                    "norm_silu_conv3d: a tile of ", to.size[2 + i], " with ", pads[2 * i], " and ", pads[2 * i + 1],
                    " zero planes does not fit x, which has ", from.size[2 + i], " planes there");
  }
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "norm_silu_conv3d: scale and shift go together");
  for (const OptionalTensor* t : {&scale, &shift})
    STD_TORCH_CHECK(!*t || ((*t)->scalar_type() == ScalarType::Float && (*t)->is_contiguous() && (*t)->dim() == 2 &&
                            (*t)->size(0) == from.size[0] && (*t)->size(1) == from.size[1]),
                    "norm_silu_conv3d: scale and shift must be contiguous float32 [", from.size[0], ", ",
                    from.size[1], "]");
  if (out.numel() == 0) return;

  const int64_t channels = from.size[1], width = std::lcm(channels, isa.step);
  std::vector<Fold> folds;
  for (int64_t b = 0; b < from.size[0]; ++b) folds.emplace_back(b, channels, width, scale, shift);
  const bool plain = !scale && !silu;
  const int64_t left = pads[4] * channels, right = pads[5] * channels, row = to.numbers() - left - right;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* source = static_cast<const T*>(x.const_data_ptr());
    T* target = static_cast<T*>(out.mutable_data_ptr());
    const auto& kernels = kernels_of(isa, zero);
    torch::stable::parallel_for(0, to.count(), 1, [&](int64_t begin, int64_t end) {
      std::vector<T> buffer(upsample ? from.numbers() : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / (to.size[2] * to.size[3]);
        const int64_t d = i / to.size[3] % to.size[2] - pads[0], h = i % to.size[3] - pads[2];
        T* y = target + to.at(i);
        if (d < 0 || d >= to.size[2] - pads[0] - pads[1] || h < 0 || h >= to.size[3] - pads[2] - pads[3]) {
          std::fill_n(y, to.numbers(), T{});
          continue;
        }
        std::fill_n(y, left, T{});
        std::fill_n(y + left + row, right, T{});
        y += left;
        const T* from_row = source + from.at(b, (d + skip[0]) / zoom, (h + skip[1]) / zoom);
        if (!upsample) from_row += skip[2] * channels;
        if (!upsample && plain) std::copy_n(from_row, row, y);
        if (!upsample && !plain) folds[b].apply(kernels, from_row, row, silu, y);
        if (!upsample) continue;
        if (!plain) folds[b].apply(kernels, from_row, from.numbers(), silu, buffer.data());
        const T* voxels = plain ? from_row : buffer.data();
        for (int64_t w = 0; w < row / channels; ++w)
          std::copy_n(voxels + (w + skip[2]) / 2 * channels, channels, y + w * channels);
      }
    });
  };
  type == ScalarType::Float ? run(0.0f) : run(uint16_t{});
}

void conv_output(const Tensor& y, const OptionalTensor& residual, const Tensor& out, const OptionalTensor& statistics,
                 const std::optional<std::string>& isa_name) {
  const char* op = "norm_silu_conv3d";
  const GroupNormSiluIsa& isa = find_group_norm_silu_isa(op, isa_name);
  const ScalarType type = out.scalar_type();
  const Rows to(op, "out", out, type), from(op, "the convolution's output", y, type);
  const Rows added(op, "residual", residual ? *residual : y, type);
  for (int i = 0; i < 5; ++i)
    STD_TORCH_CHECK(from.size[i] == to.size[i] && added.size[i] == to.size[i], "norm_silu_conv3d: out has ",
                    to.size[i], " along axis ", i, ", the convolution gave ", from.size[i], ", the residual has ",
                    added.size[i]);
  const int64_t samples = to.size[0], channels = to.size[1], sample_rows = to.size[2] * to.size[3];
  const int64_t numbers = to.numbers();
  STD_TORCH_CHECK(from.stride[3] == numbers && from.stride[2] == to.size[3] * numbers,
                  "norm_silu_conv3d: the convolution's output must be contiguous in channels-last memory");
  STD_TORCH_CHECK(!statistics || (statistics->scalar_type() == ScalarType::Float && statistics->dim() == 3 &&
                                  statistics->size(0) == samples && statistics->size(1) == 2 &&
                                  statistics->size(2) == channels && statistics->stride(2) == 1),
                  "norm_silu_conv3d: statistics must be float32 [", samples, ", 2, ", channels, "]");
  if (out.numel() == 0) return;
  // rows are taken in chunks that stay in cache, whatever the number of threads is
  constexpr int64_t kChunk = 1 << 17;  // numbers
  const int64_t width = std::lcm(channels, isa.step), chunk_rows = std::max<int64_t>(1, kChunk / numbers);
  const int64_t chunks = (sample_rows + chunk_rows - 1) / chunk_rows;
  std::vector<Moments> moments(statistics ? samples * chunks * channels : 0);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    T *source = static_cast<T*>(y.mutable_data_ptr()), *target = static_cast<T*>(out.mutable_data_ptr());
    const T* other = residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    const auto& kernels = kernels_of(isa, zero);
    torch::stable::parallel_for(0, samples * chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> mean(width), m2(width);
      std::vector<T> rest(width);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / chunks * sample_rows + i % chunks * chunk_rows;
        const int64_t last = std::min(first + chunk_rows, (i / chunks + 1) * sample_rows);
        T* part = source + from.at(first);
        for (int64_t row = first; row < last; ++row) {
          T* values = source + from.at(row);
          if (other) kernels.add(values, other + added.at(row), numbers, values);
          std::copy_n(values, numbers, target + to.at(row));
        }
        if (!statistics) continue;
        Moments* of_channel = moments.data() + i * channels;
        const auto add = [&](const T* rows, int64_t repeats, int64_t columns) {
          if (repeats == 0) return;
          kernels.moments(rows, repeats, width, mean.data(), m2.data());
          for (int64_t c = 0; c < columns; ++c) of_channel[c % channels].merge(repeats, mean[c], m2[c]);
        };
        const int64_t count = (last - first) * numbers, whole = count / width * width;
        add(part, whole / width, width);
        if (whole < count) {
          std::fill(rest.begin(), rest.end(), T{});
          std::copy(part + whole, part + count, rest.begin());
          add(rest.data(), 1, count - whole);
        }
      }
    });
  };
  type == ScalarType::Float ? run(0.0f) : run(uint16_t{});
  if (!statistics) return;
  float* to_statistics = statistics->mutable_data_ptr<float>();
  for (int64_t b = 0; b < samples; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      Moments all;
      for (int64_t i = b * chunks; i < (b + 1) * chunks; ++i) {
        const Moments& part = moments[i * channels + c];
        all.merge(part.count, part.mean, part.m2);
      }
      float* at = to_statistics + b * statistics->stride(0) + c;
      at[0] = static_cast<float>(all.mean);
      at[statistics->stride(1)] = static_cast<float>(all.m2);
    }
  }
}

void blur3d(const Tensor& x, const std::vector<int64_t>& pads, const Tensor& out,
            const std::optional<std::string>& isa_name) {
  const char* op = "blur3d";
  const GroupNormSiluIsa& isa = find_group_norm_silu_isa(op, isa_name);
  const ScalarType type = out.scalar_type();
  const Rows from(op, "x", x, type), to(op, "out", out, type);
  STD_TORCH_CHECK(pads.size() == 6, "blur3d: pads must be 6 numbers, got ", pads.size());
  STD_TORCH_CHECK(from.size[0] == to.size[0] && from.size[1] == to.size[1],
                  "blur3d: x and out must have the same samples and channels");
  int64_t inside[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t n = to.size[2 + i], before = pads[2 * i], after = pads[2 * i + 1];
    inside[i] = n - before - after;
    STD_TORCH_CHECK(before >= 0 && before <= 1 && after >= 0 && after <= 1 && from.size[2 + i] == inside[i] + 2,
                    "blur3d: x must have ", inside[i] + 2, " planes for ", n, " of out, got ", from.size[2 + i]);
    if (inside[i] <= 0) return;
  }
  const int64_t channels = from.size[1], count = inside[2] * channels;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* source = static_cast<const T*>(x.const_data_ptr());
    T* target = static_cast<T*>(out.mutable_data_ptr());
    const auto& kernels = kernels_of(isa, zero);
    torch::stable::parallel_for(0, to.size[0] * inside[0] * inside[1], 1, [&](int64_t begin, int64_t end) {
      std::vector<float> line(count + 2 * channels);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / (inside[0] * inside[1]), d = i / inside[1] % inside[0], h = i % inside[1];
        const T* rows[9];
        for (int r = 0; r < 9; ++r) rows[r] = source + from.at(b, d + r / 3, h + r % 3);
        T* y = target + to.at(b, d + pads[0], h + pads[2]) + pads[4] * channels;
        kernels.blur(rows, count, channels, line.data(), y);
      }
    });
  };
  type == ScalarType::Float ? run(0.0f) : run(uint16_t{});
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) {
  m.impl("_conv_input", TORCH_BOX(&meddiff::conv_input));
  m.impl("_conv_output", TORCH_BOX(&meddiff::conv_output));
  m.impl("_blur3d", TORCH_BOX(&meddiff::blur3d));
}
