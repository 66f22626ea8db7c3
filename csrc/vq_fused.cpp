// The search of vq_nearest.h with what stands before and behind it. Tokens go through a buffer that stays in cache:
// read and transformed, searched, written to where they belong.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "vq_codebook.h"

namespace meddiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kStep = 256;  // tokens in the buffer, a multiple of every tile

// A volume [B, D, H, W] of tokens, numbered in that order.
struct Grid {
  int64_t batch, d, h, w;

  int64_t sample() const { return d * h * w; }
  int64_t tokens() const { return batch * sample(); }
};

// Calls read(token, z) with z[c·kStep] for each token's C numbers to be written, and found(token, index) with its code.
// Without codes, found is not called.
template <class Read, class Found>
void search_tokens(int64_t tokens, int64_t channels, const float* codes, int64_t n_codes, const Read& read,
                   const Found& found) {
  static const VqNearestIsa& isa = *vq_nearest_isas().front();
  const Codebook book(codes, n_codes, channels);
  VqNearestSearch s{};
  s.blocks = (n_codes + kVqBlock - 1) / kVqBlock;
  s.centre = book.centre.data();
  s.rows = book.rows.data();
  s.columns = book.columns.data();
  s.radius = book.radius;

  const int64_t steps = (tokens + kStep - 1) / kStep;
  constexpr int64_t kWorthAThread = 1 << 20;  // multiplications
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (kStep * (n_codes + channels) * channels));
  torch::stable::parallel_for(0, steps, grain, [&](int64_t begin, int64_t end) {
    std::vector<CacheLine> scratch(isa.tile * (2 * channels + s.blocks) / 16 + 1);
    std::vector<float> z(channels * kStep);
    std::vector<int64_t> index(kStep);
    VqNearestSearch part = s;
    part.z = z.data();
    part.index = index.data();
    for (int64_t first = begin * kStep; first < std::min(end * kStep, tokens); first += kStep) {
      const int64_t count = std::min(kStep, tokens - first);
      for (int64_t i = 0; i < count; ++i) read(first + i, z.data() + i);
      if (n_codes == 0) continue;
      const int64_t size[5] = {1, channels, 1, 1, count}, stride[5] = {0, kStep, 0, 0, 1};
      std::copy_n(size, 5, part.size);
      std::copy_n(stride, 5, part.stride);
      isa.kernel(part, 0, count, scratch.data()->floats);
      for (int64_t i = 0; i < count; ++i) found(first + i, index[i]);
    }
  });
}

void check_codes(const char* op, const Tensor& codes, int64_t channels, int64_t least) {
  STD_TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == ScalarType::Float && codes.size(1) == channels &&
                      codes.size(0) >= least,
                  op, ": codes must be float32 [K, ", channels, "] with K >= ", least, ", got ", codes.dim(),
                  " dimensions of type ", codes.scalar_type());
}

// Reads features [n, C, q, q, q] of any strides, n = B·(D/q)·(H/q)·(W/q), as the volume they make up.
template <class T>
struct PatchReader {
  const T* features;
  int64_t stride[5];
  int64_t q;
  Grid grid;

  const T* operator()(int64_t token) const {
    const int64_t w = token % grid.w, h = token / grid.w % grid.h;
    const int64_t d = token / (grid.w * grid.h) % grid.d, b = token / grid.sample();
    const int64_t patch = ((b * (grid.d / q) + d / q) * (grid.h / q) + h / q) * (grid.w / q) + w / q;
    return features + patch * stride[0] + d % q * stride[2] + h % q * stride[3] + w % q * stride[4];
  }
};

template <class T>
void encode_in(const PatchReader<T>& at, int64_t channels, const float* weight, const float* bias, const float* codes,
               int64_t n_codes, float* latent, int64_t* index, float* rows) {
  const int64_t sample = at.grid.sample();
  const auto read = [&](int64_t token, float* z) {
    const T* x = at(token);
    float* target = latent + token / sample * channels * sample + token % sample;
    for (int64_t o = 0; o < channels; ++o) {
      float sum = bias[o];
      for (int64_t c = 0; c < channels; ++c) sum += weight[o * channels + c] * static_cast<float>(x[c * at.stride[1]]);
      z[o * kStep] = target[o * sample] = sum;
    }
  };
  search_tokens(at.grid.tokens(), channels, codes, n_codes, read, [&](int64_t token, int64_t k) {
    index[token] = k;
    if (rows != nullptr) std::copy_n(codes + k * channels, channels, rows + token * channels);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vq_encode(const Tensor& features, const Tensor& weight_in,
                                                     const Tensor& bias_in, const Tensor& codes_in, int64_t d,
                                                     int64_t h, int64_t w, bool want_rows, bool want_statistics) {
  STD_TORCH_CHECK(features.dim() == 5 && features.size(1) > 0 && features.size(2) > 0 &&
                      features.size(3) == features.size(2) && features.size(4) == features.size(2),
                  "vq_encode: features must be [n, C, q, q, q], got ", features.dim(), " dimensions");
  const int64_t channels = features.size(1), q = features.size(2);
  STD_TORCH_CHECK(d > 0 && h > 0 && w > 0 && d % q == 0 && h % q == 0 && w % q == 0 &&
                      features.size(0) * q * q * q % (d * h * w) == 0,
                  "vq_encode: ", features.size(0), " patches of ", q, "³ make no volumes of ", d, ", ", h, ", ", w);
  STD_TORCH_CHECK(weight_in.dim() == 2 && weight_in.scalar_type() == ScalarType::Float &&
                      weight_in.size(0) == channels && weight_in.size(1) == channels && bias_in.dim() == 1 &&
                      bias_in.scalar_type() == ScalarType::Float && bias_in.size(0) == channels,
                  "vq_encode: weight and bias must be float32 [", channels, ", ", channels, "] and [", channels, "]");
  check_codes("vq_encode", codes_in, channels, 0);
  const Grid grid{features.size(0) * q * q * q / (d * h * w), d, h, w};
  const Tensor weight = torch::stable::contiguous(weight_in), bias = torch::stable::contiguous(bias_in);
  const Tensor codes = torch::stable::contiguous(codes_in);
  const int64_t n_codes = codes.size(0), searched = n_codes > 0 ? grid.batch : 0;
  Tensor latent = torch::stable::new_empty(features, {grid.batch, channels, d, h, w}, ScalarType::Float);
  Tensor index = torch::stable::new_empty(features, {searched, d, h, w}, ScalarType::Long);
  Tensor rows = torch::stable::new_empty(features, {want_rows ? searched : 0, d, h, w, channels}, ScalarType::Float);
  Tensor statistics =
      torch::stable::new_empty(features, {want_statistics ? n_codes : 0, channels + 1}, ScalarType::Float);

  float* z = latent.mutable_data_ptr<float>();
  int64_t* k = index.mutable_data_ptr<int64_t>();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    PatchReader<T> at{static_cast<const T*>(features.const_data_ptr()), {}, q, grid};
    std::copy_n(features.strides().data(), 5, at.stride);
    encode_in(at, channels, weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), codes.const_data_ptr<float>(),
              n_codes, z, k, want_rows ? rows.mutable_data_ptr<float>() : nullptr);
  };
  switch (features.scalar_type()) {
    case ScalarType::Float:
      run(0.0f);
      break;
    case ScalarType::BFloat16:
      run(c10::BFloat16());
      break;
    case ScalarType::Half:
      run(c10::Half());
      break;
    default:
      STD_TORCH_CHECK(false, "vq_encode: features must be float32, bfloat16 or float16, got ", features.scalar_type());
  }
  if (want_statistics && n_codes > 0) {
    // one thread, in the order of the tokens: the same sums for any number of threads
    float* sums = statistics.mutable_data_ptr<float>();
    std::fill_n(sums, n_codes * (channels + 1), 0.0f);
    for (int64_t token = 0; token < grid.tokens(); ++token) {
      const float* x = z + token / grid.sample() * channels * grid.sample() + token % grid.sample();
      float* row = sums + k[token] * (channels + 1);
      for (int64_t c = 0; c < channels; ++c) row[c] += x[c * grid.sample()];
      row[channels] += 1;
    }
  }
  return {latent, index, rows, statistics};
}

std::tuple<Tensor, Tensor> vq_decode(const Tensor& latent, std::optional<double> minimum, std::optional<double> maximum,
                                     const Tensor& codes_in, const Tensor& table_in) {
  STD_TORCH_CHECK(latent.dim() == 5 && latent.scalar_type() == ScalarType::Float && latent.size(1) > 0,
                  "vq_decode: latent must be float32 [B, C, D, H, W] with C >= 1, got ", latent.dim(),
                  " dimensions of type ", latent.scalar_type());
  const int64_t channels = latent.size(1);
  check_codes("vq_decode", codes_in, channels, 1);
  STD_TORCH_CHECK(table_in.dim() == 2 && table_in.size(0) == codes_in.size(0),
                  "vq_decode: table must be [", codes_in.size(0), ", M], got ", table_in.dim(), " dimensions");
  STD_TORCH_CHECK(minimum.has_value() == maximum.has_value(), "vq_decode: give both of minimum and maximum, or neither");
  const Grid grid{latent.size(0), latent.size(2), latent.size(3), latent.size(4)};
  const Tensor codes = torch::stable::contiguous(codes_in), table = torch::stable::contiguous(table_in);
  const int64_t width = table.size(1);
  Tensor index = torch::stable::new_empty(latent, {grid.batch, grid.d, grid.h, grid.w}, ScalarType::Long);
  Tensor rows = torch::stable::new_empty(latent, {grid.batch, grid.d, grid.h, grid.w, width}, table.scalar_type());
  if (grid.tokens() == 0) return {index, rows};

  const bool scaled = minimum.has_value();
  const float half = scaled ? static_cast<float>((*maximum - *minimum) / 2) : 1.0f;
  const float low = scaled ? static_cast<float>(*minimum) : 0.0f;
  int64_t stride[5];
  std::copy_n(latent.strides().data(), 5, stride);
  const float* source = latent.const_data_ptr<float>();
  const size_t row_bytes = static_cast<size_t>(width) * table.element_size();
  const char* table_data = static_cast<const char*>(table.const_data_ptr());
  char* rows_data = static_cast<char*>(rows.mutable_data_ptr());
  int64_t* k = index.mutable_data_ptr<int64_t>();
  const auto read = [&](int64_t token, float* z) {
    const int64_t w = token % grid.w, h = token / grid.w % grid.h;
    const int64_t d = token / (grid.w * grid.h) % grid.d, b = token / grid.sample();
    const float* x = source + b * stride[0] + d * stride[2] + h * stride[3] + w * stride[4];
    for (int64_t c = 0; c < channels; ++c) {
      const float value = x[c * stride[1]];
      z[c * kStep] = scaled ? (value + 1) * half + low : value;
    }
  };
  search_tokens(grid.tokens(), channels, codes.const_data_ptr<float>(), codes.size(0), read,
                [&](int64_t token, int64_t found) {
                  k[token] = found;
                  std::memcpy(rows_data + token * row_bytes, table_data + found * row_bytes, row_bytes);
                });
  return {index, rows};
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) {
  m.impl("_vq_encode", TORCH_BOX(&meddiff::vq_encode));
  m.impl("_vq_decode", TORCH_BOX(&meddiff::vq_decode));
}
