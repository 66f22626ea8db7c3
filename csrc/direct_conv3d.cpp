// Convolutions 3³ and transposed convolutions 4³ of stride 2 on the CPU in bfloat16, with norm and SiLU before them and
// bias, residual and statistics behind, while the numbers are in cache. A transposed convolution is one of 2³ for each
// of the 2³ places that an output voxel can have.
#include "direct_conv3d.h"

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
#include "numbers.h"
#include "processor.h"

namespace meddiff {
namespace {

constexpr int64_t kCache = 3 << 18;  // bytes of inputs of a thread at a time, as kernels/direct_conv3d.py has it

std::vector<const DirectConvIsa*> isas() {
  std::vector<const DirectConvIsa*> found;
#if defined(__x86_64__)
  if (has_amx()) found.push_back(&kDirectConvAmx);
#endif
  found.push_back(&kDirectConvPortable);
  return found;
}

std::vector<std::string> direct_conv3d_isas() {
  std::vector<std::string> names;
  for (const DirectConvIsa* isa : isas()) names.push_back(isa->name);
  return names;
}

const DirectConvIsa& find_isa(const char* op, const std::optional<std::string>& name) {
  for (const DirectConvIsa* isa : isas())
    if (!name || *name == isa->name) return *isa;
  STD_TORCH_CHECK(false, op, ": isa must be one of torch.ops.meddiff._direct_conv3d_isas(), got ", *name);
}

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t multiple_up(int64_t a, int64_t b) { return quotient_up(a, b) * b; }

float to_float(uint16_t number) {
  const uint32_t bits = static_cast<uint32_t>(number) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Where the numbers of a convolution lie: see DirectConvRows.
struct Layout {
  int64_t channels, outputs, extra;  // extra: channels of the shortcut, or 0
  bool doubles;
  int64_t taps, phases;  // taps along an axis; places of an output voxel
  int64_t voxel, extra_voxel;  // numbers of a voxel, with zeros behind its channels
  int64_t group = 1, blocks, extra_blocks, columns;

  Layout(int64_t channels, int64_t outputs, int64_t extra, bool doubles)
      : channels(channels), outputs(outputs), extra(extra), doubles(doubles), taps(doubles ? 2 : 3),
        phases(doubles ? 8 : 1), voxel(channels > 16 ? multiple_up(channels, 32) : channels > 8 || doubles ? 16 : 8) {
    // the fewest products for each voxel. The run of a unit is whole blocks: it has no numbers of other voxels.
    if (!doubles && voxel <= 16) group = 2;
    for (const int64_t other : {2, 6})
      if (!doubles && products(other) * group < products(group) * other) group = other;
    blocks = (group + taps - 1) * voxel / 32;
    columns = multiple_up(group * outputs, 16);
    extra_voxel = extra <= 16 && group > 1 ? 16 : multiple_up(extra, 32);
    extra_blocks = group * extra_voxel / 32;
  }

  int64_t products(int64_t units) const {
    return (units + taps - 1) * voxel / 32 * quotient_up(units * outputs, 16);
  }
  int64_t depth() const { return taps * taps * blocks + (extra ? extra_blocks : 0); }  // in blocks
  int64_t weight_numbers() const { return 32 * depth() * columns; }
};

// 16 columns of DirectConvRows::weight: weight [O, C, …], or [C, O, …] if it doubles, and residual_weight [O, R, …].
void arrange(const DirectConvIsa& isa, const Layout& layout, int64_t phase, const Tensor& weight,
             const OptionalTensor& residual_weight, int64_t column, uint16_t* to) {
  const int64_t first = column / 32 * 32, tiles = std::min<int64_t>(2, (layout.columns - first) / 16);
  to += 32 * layout.depth() * first + (column - first) / 16 * 512;
  // `count` channels of all columns; those of a unit's first voxel begin at number `run` of `block`
  const auto place = [&](const uint16_t* from, int64_t output, int64_t channel, int64_t count, int64_t block,
                         int64_t run, int64_t voxel) {
    std::vector<uint16_t> dense(channel == 1 ? 0 : 16 * count);
    if (layout.group == 1 && voxel % 32 == 0) {
      const int64_t columns = std::min<int64_t>(16, layout.outputs - column);
      from += column * output;
      if (channel != 1) {
        for (int64_t i = 0; i < columns; ++i)
          for (int64_t c = 0; c < count; ++c) dense[i * count + c] = from[i * output + c * channel];
        from = dense.data(), output = count;
      }
      for (int64_t c = 0; c < count; c += 32)
        isa.arrange(from + c, output, columns, std::min<int64_t>(32, count - c),
                    to + (block + (run + c) / 32) * tiles * 512);
      return;
    }
    for (int64_t i = column; i < std::min(column + 16, layout.group * layout.outputs); ++i)
      for (int64_t c = 0; c < count; ++c) {
        const int64_t k = run + i / layout.outputs * voxel + c;
        to[(block + k / 32) * tiles * 512 + k % 32 / 2 * 32 + i % 16 * 2 + k % 2] =
            from[i % layout.outputs * output + c * channel];
      }
  };
  const auto* from = static_cast<const uint16_t*>(weight.const_data_ptr());
  const int64_t taps = layout.taps;
  for (int64_t t = 0; t < taps * taps * taps; ++t) {
    const int64_t tap[3] = {t / (taps * taps), t / taps % taps, t % taps};
    int64_t at = 0;
    for (int axis = 0; axis < 3; ++axis)  // an even output takes the kernel's planes 3 and 1, an odd one 2 and 0
      at += weight.stride(2 + axis) * (layout.doubles ? 3 - (phase >> (2 - axis) & 1) - 2 * tap[axis] : tap[axis]);
    place(from + at, weight.stride(layout.doubles ? 1 : 0), weight.stride(layout.doubles ? 0 : 1), layout.channels,
          t / taps * layout.blocks, tap[2] * layout.voxel, layout.voxel);
  }
  if (layout.extra)
    place(static_cast<const uint16_t*>(residual_weight->const_data_ptr()), residual_weight->stride(0),
          residual_weight->stride(1), layout.extra, taps * taps * layout.blocks, 0, layout.extra_voxel);
}

// How the work is cut: strips of rows, and each strip into parts along D.
struct Cut {
  int64_t strip, strips, parts, planes;

  Cut(int64_t samples, int64_t depth, int64_t height, int64_t row_bytes, int64_t threads) {
    const int64_t most = std::max<int64_t>(1, kCache / (3 * row_bytes) - 2);
    strips = quotient_up(height, std::min(most, height));
    strip = quotient_up(height, strips);
    strips = quotient_up(height, strip);
    int64_t least = 0;
    for (int64_t n = 1; n <= depth; ++n) {  // each part reads two planes more
      const int64_t time = quotient_up(samples * strips * n, threads) * (quotient_up(depth, n) + 2);
      if (n == 1 || time < least) least = time, parts = n;
    }
    planes = quotient_up(depth, parts);
  }
};

void check_weight(const char* op, const Tensor& weight, int64_t first, int64_t second, int64_t edge) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::BFloat16 && weight.dim() == 5 && weight.size(0) == first &&
                      weight.size(1) == second && weight.size(2) == edge && weight.size(3) == edge &&
                      weight.size(4) == edge,
                  op, ": the weight must be bfloat16 [", first, ", ", second, ", ", edge, ", ", edge, ", ", edge, "]");
}

void add_bias(const char* op, const Layout& layout, const OptionalTensor& bias, std::vector<float>& sums) {
  if (!bias) return;
  STD_TORCH_CHECK(bias->scalar_type() == ScalarType::BFloat16 && bias->dim() == 1 && bias->size(0) == layout.outputs,
                  op, ": the bias must be bfloat16 [", layout.outputs, "]");
  const auto* numbers = static_cast<const uint16_t*>(bias->const_data_ptr());
  for (int64_t i = 0; i < layout.group * layout.outputs; ++i)
    sums[i] += to_float(numbers[i % layout.outputs * bias->stride(0)]);
}

void run(const char* op, const Layout& layout, const Tensor& x, const OptionalTensor& scale,
         const OptionalTensor& shift, bool silu, const Tensor& weight, const OptionalTensor& bias,
         const std::vector<int64_t>& pads, const OptionalTensor& residual, const OptionalTensor& residual_weight,
         const OptionalTensor& residual_bias, const Tensor& out, const OptionalTensor& statistics,
         const std::optional<std::string>& isa_name) {
  const DirectConvIsa& isa = find_isa(op, isa_name);
  const GroupNormSiluIsa& rows_isa = find_group_norm_silu_isa(op, std::nullopt);
  const ScalarType type = ScalarType::BFloat16;
  const Rows from(op, "x", x, type), to(op, "out", out, type), added(op, "residual", residual ? *residual : out, type);
  const int64_t zoom = layout.doubles ? 2 : 1, channels = layout.channels, outputs = layout.outputs;
  STD_TORCH_CHECK(pads.size() == 6, op, ": pads must be 6 numbers, got ", pads.size());
  for (const int64_t pad : pads) STD_TORCH_CHECK(pad == 0 || pad == 1, op, ": pads must be 0 or 1, got ", pad);
  STD_TORCH_CHECK(channels > 0, op, ": x must have channels");
  STD_TORCH_CHECK(from.size[0] == to.size[0] && to.size[1] == outputs, op, ": out must be [", from.size[0], ", ",
                  outputs, ", D, H, W]");
  for (int i = 2; i < 5; ++i) {
    const int64_t read = to.size[i] / zoom + 2 - pads[2 * i - 4] - pads[2 * i - 3];
    STD_TORCH_CHECK(to.size[i] % zoom == 0 && from.size[i] == read, op, ": x must have ", read, " planes for ",
                    to.size[i], " of out along axis ", i, ", got ", from.size[i]);
    STD_TORCH_CHECK(added.size[i] == to.size[i], op, ": the residual must have out's size");
  }
  STD_TORCH_CHECK(added.size[0] == to.size[0] && added.size[1] == (layout.extra ? layout.extra : outputs), op,
                  ": the residual must have out's samples, and its channels or those of residual_weight");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), op, ": scale and shift go together");
  for (const OptionalTensor* t : {&scale, &shift})
    STD_TORCH_CHECK(!*t || ((*t)->scalar_type() == ScalarType::Float && (*t)->is_contiguous() && (*t)->dim() == 2 &&
                            (*t)->size(0) == from.size[0] && (*t)->size(1) == channels),
                    op, ": scale and shift must be contiguous float32 [", from.size[0], ", ", channels, "]");
  STD_TORCH_CHECK(!statistics || (statistics->scalar_type() == ScalarType::Float && statistics->dim() == 3 &&
                                  statistics->size(0) == to.size[0] && statistics->size(1) == 2 &&
                                  statistics->size(2) == outputs && statistics->stride(2) == 1),
                  op, ": statistics must be float32 [", to.size[0], ", 2, ", outputs, "]");
  std::vector<float> biases(layout.columns);
  add_bias(op, layout, bias, biases);
  add_bias(op, layout, residual_bias, biases);
  if (out.numel() == 0) return;

  Numbers weights(layout.phases * layout.weight_numbers());
  const int64_t tiles = layout.columns / 16;
  torch::stable::parallel_for(0, layout.phases * tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      arrange(isa, layout, i / tiles, weight, residual_weight, i % tiles * 16,
              weights.data() + i / tiles * layout.weight_numbers());
  });

  const int64_t samples = to.size[0], depth = to.size[2] / zoom, height = to.size[3] / zoom, width = to.size[4] / zoom;
  const int64_t pitch = multiple_up(width + 2, layout.group), row = pitch * layout.voxel;
  const Cut cut(samples, depth, height, 2 * row, torch::stable::get_num_threads());
  const int64_t behind = 64 * layout.group * std::max(layout.voxel, layout.extra_voxel) + 2 * layout.voxel;
  const int64_t plane = multiple_up((cut.strip + 2) * row + behind, 32);
  const int64_t extra_row = pitch * layout.extra_voxel, extra_plane = layout.extra ? cut.strip * extra_row + behind : 0;

  std::vector<Fold> folds;
  for (int64_t b = 0; b < samples; ++b)
    folds.emplace_back(b, channels, std::lcm(channels, rows_isa.step), scale, shift);
  const bool plain = !scale && !silu;
  const int64_t slots = statistics ? samples * cut.strips * depth * layout.phases * layout.columns : 0;
  std::vector<float> pivots(slots);
  std::vector<double> sums(slots), squares(slots);

  const auto* source = static_cast<const uint16_t*>(x.const_data_ptr());
  const auto* other = residual ? static_cast<const uint16_t*>(residual->const_data_ptr()) : nullptr;
  auto* target = static_cast<uint16_t*>(out.mutable_data_ptr());
  const auto spread = [](const uint16_t* voxels, int64_t count, int64_t numbers, int64_t step, uint16_t* rows) {
    if (numbers == step) {
      std::copy_n(voxels, count * numbers, rows);
      return;
    }
    for (int64_t i = 0; i < count; ++i) std::copy_n(voxels + i * numbers, numbers, rows + i * step);
  };

  torch::stable::parallel_for(0, samples * cut.strips * cut.parts, 1, [&](int64_t begin, int64_t end) {
    Numbers planes(3 * plane), extras(extra_plane);
    std::vector<uint16_t> line(from.numbers());
    isa.begin();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (cut.strips * cut.parts), strip = i / cut.parts % cut.strips, part = i % cut.parts;
      const int64_t top = strip * cut.strip, rows = std::min(cut.strip, height - top);
      const int64_t first = part * cut.planes, last = std::min(first + cut.planes, depth);
      const auto read = [&](int64_t d) {  // the strip's rows of plane d of the inputs, zero planes counted
        uint16_t* at = planes.data() + d % 3 * plane;
        const int64_t plane_of_x = d - pads[0];
        for (int64_t h = top; h < top + rows + 2; ++h, at += row) {
          const int64_t row_of_x = h - pads[2];
          if (plane_of_x < 0 || plane_of_x >= from.size[2] || row_of_x < 0 || row_of_x >= from.size[3]) {
            std::fill_n(at, row, uint16_t{});
            continue;
          }
          const uint16_t* voxels = source + from.at(b, plane_of_x, row_of_x);
          const bool in_place = layout.voxel == channels;
          uint16_t* inside = at + pads[4] * layout.voxel;
          if (!plain) {
            uint16_t* activated = in_place ? inside : line.data();
            folds[b].apply(rows_isa.bfloat16, voxels, from.numbers(), silu, activated);
            voxels = activated;
          }
          if (plain || !in_place) spread(voxels, from.size[4], channels, layout.voxel, inside);
          std::fill(at, inside, uint16_t{});
          std::fill(inside + from.size[4] * layout.voxel, at + row, uint16_t{});
        }
      };
      for (int64_t d = first; d < last; ++d) {
        if (d == first) read(d), read(d + 1);
        read(d + 2);
        DirectConvRows work{};
        if (layout.extra) {
          work.shortcut = extras.data();
          work.shortcut_step = layout.group * layout.extra_voxel, work.shortcut_blocks = layout.extra_blocks;
          for (int64_t h = 0; h < rows; ++h)
            spread(other + added.at(b, d, top + h), width, layout.extra, layout.extra_voxel,
                   extras.data() + h * extra_row);
        } else if (residual) {
          work.residual = other + added.at(b, d, top), work.residual_row = added.stride[3];
        }
        work.taps = layout.taps * layout.taps, work.step = layout.group * layout.voxel, work.blocks = layout.blocks;
        work.bias = biases.data(), work.columns = layout.columns;
        work.height = rows, work.width = width, work.units = pitch / layout.group;
        work.group = layout.group, work.outputs = outputs;
        work.out_row = zoom * to.stride[3], work.out_voxel = zoom * outputs;
        for (int64_t phase = 0; phase < layout.phases; ++phase) {
          const int64_t place[3] = {phase >> 2, phase >> 1 & 1, phase & 1};
          for (int64_t t = 0; t < work.taps; ++t)
            work.inputs[t] = planes.data() + (d + place[0] + t / layout.taps) % 3 * plane +
                             (place[1] + t % layout.taps) * row + place[2] * layout.voxel;
          work.weight = weights.data() + phase * layout.weight_numbers();
          work.out = target + to.at(b, zoom * d + place[0], zoom * top + place[1]) + place[2] * outputs;
          if (statistics) {
            const int64_t slot =
                (((b * cut.strips + strip) * depth + d) * layout.phases + phase) * layout.columns;
            work.pivot = pivots.data() + slot, work.sum = sums.data() + slot;
            work.sum_of_squares = squares.data() + slot;
          }
          isa.convolve(work);
        }
      }
    }
    isa.end();
  });
  if (!statistics) return;
  float* to_statistics = statistics->mutable_data_ptr<float>();
  const int64_t slots_of_strip = depth * layout.phases;
  for (int64_t b = 0; b < samples; ++b) {
    std::vector<Moments> all(outputs);
    for (int64_t i = 0; i < cut.strips * slots_of_strip; ++i) {
      const int64_t rows = std::min(cut.strip, height - i / slots_of_strip * cut.strip);
      for (int64_t column = 0; column < layout.group * outputs; ++column) {
        const int64_t slot = (b * cut.strips * slots_of_strip + i) * layout.columns + column;
        const int64_t units = quotient_up(width - column / outputs, layout.group);
        if (units <= 0) continue;
        const double count = static_cast<double>(rows * units), mean = sums[slot] / count;
        all[column % outputs].merge(count, pivots[slot] + mean, squares[slot] - sums[slot] * mean);
      }
    }
    for (int64_t o = 0; o < outputs; ++o) {
      float* at = to_statistics + b * statistics->stride(0) + o;
      at[0] = static_cast<float>(all[o].mean);
      at[statistics->stride(1)] = static_cast<float>(std::max(all[o].m2, 0.0));
    }
  }
}

void direct_conv3d(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, bool silu,
                   const Tensor& weight, const OptionalTensor& bias, const std::vector<int64_t>& pads,
                   const OptionalTensor& residual, const OptionalTensor& residual_weight,
                   const OptionalTensor& residual_bias, const Tensor& out, const OptionalTensor& statistics,
                   const std::optional<std::string>& isa) {
  const char* op = "_direct_conv3d";
  check_weight(op, weight, weight.size(0), x.size(1), 3);
  STD_TORCH_CHECK(residual || !residual_weight, op, ": residual_weight is given, and no residual");
  const int64_t extra = residual_weight ? residual->size(1) : 0;
  if (residual_weight) check_weight(op, *residual_weight, weight.size(0), extra, 1);
  const Layout layout(weight.size(1), weight.size(0), extra, false);
  run(op, layout, x, scale, shift, silu, weight, bias, pads, residual, residual_weight, residual_bias, out,
      statistics, isa);
}

void direct_up_conv3d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const std::vector<int64_t>& pads, const Tensor& out, const OptionalTensor& statistics,
                      const std::optional<std::string>& isa) {
  const char* op = "_direct_up_conv3d";
  check_weight(op, weight, x.size(1), weight.size(1), 4);
  const Layout layout(weight.size(0), weight.size(1), 0, true);
  run(op, layout, x, std::nullopt, std::nullopt, false, weight, bias, pads, std::nullopt, std::nullopt, std::nullopt,
      out, statistics, isa);
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) {
  m.impl("_direct_conv3d", TORCH_BOX(&meddiff::direct_conv3d));
  m.impl("_direct_up_conv3d", TORCH_BOX(&meddiff::direct_up_conv3d));
}
STABLE_TORCH_LIBRARY_IMPL(meddiff, CompositeExplicitAutograd, m) {
  m.impl("_direct_conv3d_isas", TORCH_BOX(&meddiff::direct_conv3d_isas));
}
