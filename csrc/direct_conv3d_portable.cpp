// For tests on processors that have no products in bfloat16: nothing takes it by itself.
#include <algorithm>

#include "direct_conv3d.h"

namespace meddiff {
namespace {

float to_float(uint16_t number) {
  const uint32_t bits = static_cast<uint32_t>(number) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void nothing() {}

void convolve(const DirectConvRows& rows) {
  const int64_t depth = rows.taps * rows.blocks + (rows.shortcut ? rows.shortcut_blocks : 0);
  for (int64_t column = 0; column < rows.group * rows.outputs; ++column) {
    const int64_t first = column / 32 * 32, tiles = std::min<int64_t>(2, (rows.columns - first) / 16);
    const uint16_t* of_column = rows.weight + first * 32 * depth + (column - first) / 16 * 512 + column % 16 * 2;
    bool has_pivot = false;
    for (int64_t row = 0; row < rows.height; ++row)
      for (int64_t unit = 0; unit * rows.group + column / rows.outputs < rows.width; ++unit) {
        const uint16_t* weight = of_column;
        float sum = 0;
        const auto add = [&](const uint16_t* run, int64_t step, int64_t blocks) {
          run += (row * rows.units + unit) * step;
          for (int64_t block = 0; block < blocks; ++block, weight += tiles * 512)
            for (int64_t k = 0; k < 32; ++k)
              sum += to_float(run[32 * block + k]) * to_float(weight[k / 2 * 32 + k % 2]);
        };
        for (int64_t t = 0; t < rows.taps; ++t) add(rows.inputs[t], rows.step, rows.blocks);
        if (rows.shortcut) add(rows.shortcut, rows.shortcut_step, rows.shortcut_blocks);
        sum += rows.bias[column];
        const int64_t at = unit * rows.group * rows.out_voxel + column;
        if (rows.residual) sum += to_float(rows.residual[row * rows.residual_row + at]);
        const uint16_t rounded = to_bfloat16(sum);
        rows.out[row * rows.out_row + at] = rounded;
        if (!rows.pivot) continue;
        if (!has_pivot) rows.pivot[column] = to_float(rounded), has_pivot = true;
        const double difference = to_float(rounded) - rows.pivot[column];
        rows.sum[column] += difference;
        rows.sum_of_squares[column] += difference * difference;
      }
  }
}

void arrange(const uint16_t* from, int64_t column, int64_t columns, int64_t count, uint16_t* tile) {
  std::fill_n(tile, 512, uint16_t{});
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t k = 0; k < count; ++k) tile[k / 2 * 32 + i * 2 + k % 2] = from[i * column + k];
}

}  // namespace

const DirectConvIsa kDirectConvPortable = {"portable", nothing, nothing, convolve, arrange};

}  // namespace meddiff
