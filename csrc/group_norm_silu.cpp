#include "group_norm_silu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "moments.h"
#include "processor.h"

namespace meddiff {

const GroupNormSiluIsa& find_group_norm_silu_isa(const char* op, const std::optional<std::string>& name) {
  static const std::vector<const GroupNormSiluIsa*> isas = [] {
    std::vector<const GroupNormSiluIsa*> found;
#if defined(__x86_64__)
    if (has_avx512()) found.push_back(&kGroupNormSiluAvx512);
    if (has_avx2()) found.push_back(&kGroupNormSiluAvx2);
#endif
    found.push_back(&kGroupNormSiluPortable);
    return found;
  }();
  if (!name) return *isas.front();
  for (const GroupNormSiluIsa* isa : isas)
    if (*name == isa->name) return *isa;
  STD_TORCH_CHECK(false, op, ": isa must be one of torch.ops.meddiff.cpu_isas(), got ", *name);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const GroupNormSiluKernels<float>& kernels_of(const GroupNormSiluIsa& isa, float) { return isa.float32; }
const GroupNormSiluKernels<uint16_t>& kernels_of(const GroupNormSiluIsa& isa, uint16_t) { return isa.bfloat16; }

// x [samples, voxels, channels]. Each sample is cut into chunks, whatever the number of threads is.
struct Stream {
  int64_t samples, voxels, channels, groups;
  int64_t width;                // of a row of the kernels
  int64_t chunk_voxels, chunks;  // of a sample

  Stream(const Tensor& x, int64_t groups, const GroupNormSiluIsa& isa)
      : samples(x.size(0)), voxels(x.size(1)), channels(x.size(2)), groups(groups) {
    width = std::lcm(channels, isa.step);
    constexpr int64_t kChunk = 1 << 16;  // numbers
    chunk_voxels = std::max<int64_t>(1, kChunk / width) * (width / channels);
    chunks = (voxels + chunk_voxels - 1) / chunk_voxels;
  }

  // Calls visit(number of the chunk among all, sample, first number, how many numbers) for every chunk, in parallel.
  template <class Visit>
  void for_chunks(const Visit& visit) const {
    torch::stable::parallel_for(0, samples * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / chunks, first = i % chunks * chunk_voxels;
        const int64_t count = std::min(chunk_voxels, voxels - first);
        visit(i, sample, (sample * voxels + first) * channels, count * channels);
      }
    });
  }

  // The numbers past the last whole row, as a row that ends in zeros.
  template <class T>
  std::vector<T> rest_of(const T* chunk, int64_t count) const {
    std::vector<T> row(width);
    std::copy(chunk + count / width * width, chunk + count, row.begin());
    return row;
  }
};

// Parameters as float32: weight, bias [channels]; scale, shift [samples, channels] or empty.
struct Parameters {
  Tensor weight, bias;
  std::optional<Tensor> scale, shift;

  static Tensor plain(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float)); }

  Parameters(const Stream& s, const Tensor& w, const Tensor& b, const std::optional<Tensor>& scale_in,
             const std::optional<Tensor>& shift_in)
      : weight(plain(w)), bias(plain(b)) {
    STD_TORCH_CHECK(w.dim() == 1 && w.size(0) == s.channels && b.dim() == 1 && b.size(0) == s.channels,
                    "group_norm_silu: weight and bias must be [", s.channels, "]");
    STD_TORCH_CHECK(scale_in.has_value() == shift_in.has_value(), "group_norm_silu: scale and shift go together");
    if (!scale_in) return;
    for (const Tensor* t : {&*scale_in, &*shift_in})
      STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == s.samples && t->size(1) == s.channels,
                      "group_norm_silu: scale and shift must be [", s.samples, ", ", s.channels, "]");
    scale = plain(*scale_in), shift = plain(*shift_in);
  }

  // of channel c and sample b: what the normalised number is multiplied by, and what is added
  std::pair<double, double> affine(int64_t b, int64_t c) const {
    const double w = weight.const_data_ptr<float>()[c], offset = bias.const_data_ptr<float>()[c];
    if (!scale) return {w, offset};
    const int64_t at = b * weight.size(0) + c;
    const double factor = 1 + static_cast<double>(scale->const_data_ptr<float>()[at]);
    return {w * factor, offset * factor + shift->const_data_ptr<float>()[at]};
  }
};

// Tables of one sample. stats [3, samples, groups]: mean, what float32 lost of it, 1 / √(variance + eps).
struct Tables {
  std::vector<float> centre, gain, offset;

  Tables(const Stream& s, const Parameters& p, const float* stats, int64_t b)
      : centre(s.width), gain(s.width), offset(s.width) {
    for (int64_t i = 0; i < s.width; ++i) {
      const int64_t c = i % s.channels, g = b * s.groups + c / (s.channels / s.groups), all = s.samples * s.groups;
      const auto [multiplier, added] = p.affine(b, c);
      const double slope = multiplier * stats[2 * all + g];
      centre[i] = stats[g];
      gain[i] = static_cast<float>(slope);
      offset[i] = static_cast<float>(added - slope * stats[all + g]);
    }
  }

  GroupNormSiluFold fold() const { return {centre.data(), gain.data(), offset.data()}; }
};

std::vector<Tables> tables_of(const Stream& s, const Parameters& p, const float* stats) {
  std::vector<Tables> tables;
  for (int64_t b = 0; b < s.samples; ++b) tables.emplace_back(s, p, stats, b);
  return tables;
}

template <class T>
void find_statistics(const Stream& s, const GroupNormSiluKernels<T>& kernels, const T* x, double eps, float* stats) {
  std::vector<double> means(s.samples * s.chunks * s.channels), m2s(means.size());
  s.for_chunks([&](int64_t i, int64_t, int64_t first, int64_t count) {
    std::vector<double> mean(s.width), m2(s.width);
    std::vector<Moments> of_channel(s.channels);
    const auto add = [&](const T* rows, int64_t repeats, int64_t columns) {
      if (columns == 0 || repeats == 0) return;
      kernels.moments(rows, repeats, s.width, mean.data(), m2.data());
      for (int64_t c = 0; c < columns; ++c) of_channel[c % s.channels].merge(repeats, mean[c], m2[c]);
    };
    add(x + first, count / s.width, s.width);
    if (count % s.width) add(s.rest_of(x + first, count).data(), 1, count % s.width);
    for (int64_t c = 0; c < s.channels; ++c) {
      means[i * s.channels + c] = of_channel[c].mean;
      m2s[i * s.channels + c] = of_channel[c].m2;
    }
  });
  const int64_t in_group = s.channels / s.groups, all = s.samples * s.groups;
  for (int64_t b = 0; b < s.samples; ++b) {
    for (int64_t g = 0; g < s.groups; ++g) {
      Moments group;
      for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
        const double count = std::min(s.chunk_voxels, s.voxels - chunk * s.chunk_voxels);
        for (int64_t c = g * in_group; c < (g + 1) * in_group; ++c) {
          const int64_t at = (b * s.chunks + chunk) * s.channels + c;
          group.merge(count, means[at], m2s[at]);
        }
      }
      float* to = stats + b * s.groups + g;
      to[0] = static_cast<float>(group.mean);
      to[all] = static_cast<float>(group.mean - to[0]);
      to[2 * all] = static_cast<float>(1 / std::sqrt(group.m2 / group.count + eps));
    }
  }
}

template <class T>
void apply(const Stream& s, const GroupNormSiluKernels<T>& kernels, const T* x, const std::vector<Tables>& tables,
           bool silu, T* y) {
  s.for_chunks([&](int64_t, int64_t b, int64_t first, int64_t count) {
    const GroupNormSiluFold fold = tables[b].fold();
    kernels.forward(x + first, count / s.width, s.width, fold, silu, y + first);
    if (const int64_t rest = count % s.width) {
      std::vector<T> row = s.rest_of(x + first, count);
      kernels.forward(row.data(), 1, s.width, fold, silu, row.data());
      std::copy_n(row.data(), rest, y + first + count - rest);
    }
  });
}

// sums [2, samples, channels]: Σ dz and Σ dz·n, z = n·multiplier + added, n being the normalised x.
template <class T>
void differentiate(const Stream& s, const GroupNormSiluKernels<T>& kernels, const T* x, const T* dy,
                   const Parameters& parameters, const float* stats, bool silu, float* sums, T* dx) {
  const std::vector<Tables> tables = tables_of(s, parameters, stats);
  std::vector<double> of_dz(s.samples * s.chunks * s.channels), of_dz_x(of_dz.size());
  s.for_chunks([&](int64_t i, int64_t b, int64_t first, int64_t count) {
    std::vector<double> dz(s.width), dz_x(s.width);
    const auto add = [&](const T* rows, const T* gradients, int64_t repeats) {
      kernels.sums(rows, gradients, repeats, s.width, tables[b].fold(), silu, dz.data(), dz_x.data());
      for (int64_t c = 0; c < s.width; ++c) {
        of_dz[i * s.channels + c % s.channels] += dz[c];
        of_dz_x[i * s.channels + c % s.channels] += dz_x[c];
      }
    };
    add(x + first, dy + first, count / s.width);
    if (count % s.width) add(s.rest_of(x + first, count).data(), s.rest_of(dy + first, count).data(), 1);
  });

  const int64_t in_group = s.channels / s.groups, all = s.samples * s.groups;
  std::vector<std::vector<float>> slopes, levels;
  for (int64_t b = 0; b < s.samples; ++b) {
    slopes.emplace_back(s.width), levels.emplace_back(s.width);
    for (int64_t g = 0; g < s.groups; ++g) {
      const float* of_group = stats + b * s.groups + g;
      const double lost = of_group[all], rstd = of_group[2 * all];
      double mean = 0, mean_n = 0;  // of dz·multiplier and dz·multiplier·n
      for (int64_t c = g * in_group; c < (g + 1) * in_group; ++c) {
        double dz = 0, dz_x = 0;
        for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
          dz += of_dz[(b * s.chunks + chunk) * s.channels + c];
          dz_x += of_dz_x[(b * s.chunks + chunk) * s.channels + c];
        }
        const double dz_n = rstd * (dz_x - lost * dz), multiplier = parameters.affine(b, c).first;
        sums[b * s.channels + c] = static_cast<float>(dz);
        sums[(s.samples + b) * s.channels + c] = static_cast<float>(dz_n);
        mean += multiplier * dz, mean_n += multiplier * dz_n;
      }
      const double numbers = static_cast<double>(s.voxels) * static_cast<double>(in_group);
      const double slope = -rstd * rstd * (mean_n / numbers);
      for (int64_t i = 0; i < s.width; ++i) {
        if (i % s.channels / in_group != g) continue;
        slopes[b][i] = static_cast<float>(slope);
        levels[b][i] = static_cast<float>(-rstd * (mean / numbers) - slope * lost);
      }
    }
  }

  s.for_chunks([&](int64_t, int64_t b, int64_t first, int64_t count) {
    const GroupNormSiluFold fold = tables[b].fold();
    const float *slope = slopes[b].data(), *level = levels[b].data();
    kernels.backward(x + first, dy + first, count / s.width, s.width, fold, slope, level, silu, dx + first);
    if (const int64_t rest = count % s.width) {
      std::vector<T> row = s.rest_of(x + first, count), gradients = s.rest_of(dy + first, count);
      kernels.backward(row.data(), gradients.data(), 1, s.width, fold, slope, level, silu, row.data());
      std::copy_n(row.data(), rest, dx + first + count - rest);
    }
  });
}

void check(const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 3, "group_norm_silu: x must be [B, voxels, C], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(groups > 0 && x.size(2) > 0 && x.size(2) % groups == 0, "group_norm_silu: ", x.size(2),
                  " channels do not make ", groups, " groups");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "group_norm_silu: x must be float32, bfloat16 or float16, got ", type);
}

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> forward(const Tensor& x_in, int64_t groups, const Tensor& weight, const Tensor& bias,
                                   double eps, const OptionalTensor& scale, const OptionalTensor& shift, bool silu,
                                   const GroupNormSiluIsa& isa) {
  check(x_in, groups);
  if (x_in.scalar_type() == ScalarType::Half) {
    const auto [y, stats] =
        forward(torch::stable::to(x_in, ScalarType::Float), groups, weight, bias, eps, scale, shift, silu, isa);
    return {torch::stable::to(y, ScalarType::Half), stats};
  }
  const Tensor x = torch::stable::contiguous(x_in);
  const Stream s(x, groups, isa);
  const Parameters parameters(s, weight, bias, scale, shift);
  Tensor y = torch::stable::new_empty(x, {s.samples, s.voxels, s.channels}, x.scalar_type());
  Tensor stats = torch::stable::new_empty(x, {3, s.samples, groups}, ScalarType::Float);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* source = static_cast<const T*>(x.const_data_ptr());
    find_statistics<T>(s, kernels_of(isa, zero), source, eps, stats.mutable_data_ptr<float>());
    apply<T>(s, kernels_of(isa, zero), source, tables_of(s, parameters, stats.const_data_ptr<float>()), silu,
             static_cast<T*>(y.mutable_data_ptr()));
  };
  x.scalar_type() == ScalarType::Float ? run(0.0f) : run(uint16_t{});
  return {y, stats};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy_in, const Tensor& x_in, const Tensor& stats, int64_t groups,
                                    const Tensor& weight, const Tensor& bias, const OptionalTensor& scale,
                                    const OptionalTensor& shift, bool silu, const GroupNormSiluIsa& isa) {
  check(x_in, groups);
  if (x_in.scalar_type() == ScalarType::Half) {
    const auto [dx, sums] = backward(torch::stable::to(dy_in, ScalarType::Float),
                                     torch::stable::to(x_in, ScalarType::Float), stats, groups, weight, bias, scale,
                                     shift, silu, isa);
    return {torch::stable::to(dx, ScalarType::Half), sums};
  }
  const Tensor x = torch::stable::contiguous(x_in), dy = torch::stable::contiguous(dy_in);
  const Stream s(x, groups, isa);
  const Parameters parameters(s, weight, bias, scale, shift);
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.dim() == 3 && dy.numel() == x.numel(),
                  "group_norm_silu: the gradient must be of x's shape and dtype");
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
                      stats.numel() == 3 * s.samples * groups,
                  "group_norm_silu: stats must be a contiguous float32 [3, ", s.samples, ", ", groups, "]");
  Tensor dx = torch::stable::new_empty(x, {s.samples, s.voxels, s.channels}, x.scalar_type());
  Tensor sums = torch::stable::new_zeros(x, {2, s.samples, s.channels}, ScalarType::Float);
  if (x.numel() == 0) return {dx, sums};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    differentiate<T>(s, kernels_of(isa, zero), static_cast<const T*>(x.const_data_ptr()),
                     static_cast<const T*>(dy.const_data_ptr()), parameters, stats.const_data_ptr<float>(), silu,
                     sums.mutable_data_ptr<float>(), static_cast<T*>(dx.mutable_data_ptr()));
  };
  x.scalar_type() == ScalarType::Float ? run(0.0f) : run(uint16_t{});
  return {dx, sums};
}

const GroupNormSiluIsa& best_isa() { return find_group_norm_silu_isa("", std::nullopt); }

const GroupNormSiluIsa& isa_named(const std::string& name) {
  return find_group_norm_silu_isa("_group_norm_silu_isa", name);
}

std::tuple<Tensor, Tensor> group_norm_silu(const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias,
                                           double eps, const OptionalTensor& scale, const OptionalTensor& shift,
                                           bool silu) {
  return forward(x, groups, weight, bias, eps, scale, shift, silu, best_isa());
}

std::tuple<Tensor, Tensor> group_norm_silu_backward(const Tensor& dy, const Tensor& x, const Tensor& stats,
                                                    int64_t groups, const Tensor& weight, const Tensor& bias,
                                                    const OptionalTensor& scale, const OptionalTensor& shift,
                                                    bool silu) {
  return backward(dy, x, stats, groups, weight, bias, scale, shift, silu, best_isa());
}

std::tuple<Tensor, Tensor> group_norm_silu_isa(const Tensor& x, int64_t groups, const Tensor& weight,
                                               const Tensor& bias, double eps, const OptionalTensor& scale,
                                               const OptionalTensor& shift, bool silu, const std::string& name) {
  return forward(x, groups, weight, bias, eps, scale, shift, silu, isa_named(name));
}

std::tuple<Tensor, Tensor> group_norm_silu_backward_isa(const Tensor& dy, const Tensor& x, const Tensor& stats,
                                                        int64_t groups, const Tensor& weight, const Tensor& bias,
                                                        const OptionalTensor& scale, const OptionalTensor& shift,
                                                        bool silu, const std::string& name) {
  return backward(dy, x, stats, groups, weight, bias, scale, shift, silu, isa_named(name));
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) {
  m.impl("_group_norm_silu", TORCH_BOX(&meddiff::group_norm_silu));
  m.impl("_group_norm_silu_backward", TORCH_BOX(&meddiff::group_norm_silu_backward));
  m.impl("_group_norm_silu_isa", TORCH_BOX(&meddiff::group_norm_silu_isa));
  m.impl("_group_norm_silu_backward_isa", TORCH_BOX(&meddiff::group_norm_silu_backward_isa));
}
