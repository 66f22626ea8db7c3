#include "amx.h"
#include "direct_conv3d.h"

namespace meddiff {
namespace {

void add_to(double* sums, __m512 numbers) {
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_cvtps_pd(_mm512_castps512_ps256(numbers))));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(numbers, 1));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}

// Bias, residual, rounding and statistics of products [count, 16·tiles], whose first column is `column`.
template <int tiles>
void finish(const DirectConvRows& rows, const float* products, int64_t first, int64_t count, int64_t column) {
  __m512 sums[tiles], squares[tiles], pivot[tiles], bias[tiles];
  for (int t = 0; t < tiles; ++t) {
    sums[t] = squares[t] = _mm512_setzero_ps();
    bias[t] = _mm512_loadu_ps(rows.bias + column + 16 * t);
  }
  int64_t row = first / rows.units, unit = first % rows.units;
  bool has_pivot = first > 0;
  if (rows.pivot && has_pivot)
    for (int t = 0; t < tiles; ++t) pivot[t] = _mm512_loadu_ps(rows.pivot + column + 16 * t);
  for (int64_t i = 0; i < count; ++i, ++unit, products += 16 * tiles) {
    if (unit == rows.units) unit = 0, ++row;
    const int64_t voxel = unit * rows.group;
    if (row >= rows.height) break;
    if (voxel >= rows.width) continue;
    const int64_t numbers = least(rows.group, rows.width - voxel) * rows.outputs - column;
    const int64_t at = voxel * rows.out_voxel + column;
    uint16_t* out = rows.out + row * rows.out_row + at;
    for (int t = 0; t < tiles; ++t) {
      const int64_t left = numbers > 16 * t ? least(16, numbers - 16 * t) : 0;
      const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
      __m512 value = _mm512_add_ps(_mm512_load_ps(products + 16 * t), bias[t]);
      if (rows.residual) {
        const uint16_t* residual = rows.residual + row * rows.residual_row + at + 16 * t;
        value = _mm512_add_ps(value, to_float(_mm256_maskz_loadu_epi16(mask, residual)));
      }
      const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
      _mm256_mask_storeu_epi16(out + 16 * t, mask, rounded);
      if (!rows.pivot) continue;
      value = to_float(rounded);
      if (!has_pivot) {
        pivot[t] = _mm512_maskz_mov_ps(mask, value);
        _mm512_storeu_ps(rows.pivot + column + 16 * t, pivot[t]);
      }
      const __m512 difference = _mm512_maskz_sub_ps(mask, value, pivot[t]);
      sums[t] = _mm512_add_ps(sums[t], difference);
      squares[t] = _mm512_fmadd_ps(difference, difference, squares[t]);
    }
    has_pivot = true;
  }
  if (!rows.pivot) return;
  for (int t = 0; t < tiles; ++t) {
    add_to(rows.sum + column + 16 * t, sums[t]);
    add_to(rows.sum_of_squares + column + 16 * t, squares[t]);
  }
}

template <int tiles>
void convolve_columns(const DirectConvRows& rows, const uint16_t* of_columns, int64_t column) {
  constexpr int64_t kUnits = 64 / tiles;
  alignas(64) float products[kUnits * 16 * tiles];
  const int64_t count = rows.height * rows.units;
  for (int64_t first = 0; first < count; first += kUnits) {
    zero_sums();
    const uint16_t* weight = of_columns;
    for (int64_t t = 0; t < rows.taps; ++t)
      weight = add_products<tiles>(rows.inputs[t] + first * rows.step, rows.step, rows.blocks, weight);
    if (rows.shortcut)
      add_products<tiles>(rows.shortcut + first * rows.shortcut_step, rows.shortcut_step, rows.shortcut_blocks, weight);
    store_sums<tiles>(products);
    finish<tiles>(rows, products, first, least(kUnits, count - first), column);
  }
}

void convolve(const DirectConvRows& rows) {
  const int64_t depth = 32 * (rows.taps * rows.blocks + (rows.shortcut ? rows.shortcut_blocks : 0));
  for (int64_t column = 0; column < rows.columns; column += 32) {
    const uint16_t* weight = rows.weight + column * depth;
    rows.columns - column > 16 ? convolve_columns<2>(rows, weight, column)
                               : convolve_columns<1>(rows, weight, column);
  }
}

}  // namespace

const DirectConvIsa kDirectConvAmx = {"amx", begin_tiles, end_tiles, convolve, arrange_tile};

}  // namespace meddiff
