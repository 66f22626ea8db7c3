#include "linear.h"

#include "amx.h"

namespace meddiff {
namespace {

__mmask16 from_on(int64_t skipped) { return static_cast<__mmask16>(skipped > 0 ? 0xffff << skipped : 0xffff); }
__mmask16 first_of(int64_t count) { return static_cast<__mmask16>(count < 16 ? (1u << count) - 1 : 0xffff); }

__m256i rounded(__m512 value) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)); }

void arrange(const uint16_t* rows, int64_t count, int64_t inputs, int64_t tile, uint16_t* to) {
  const int64_t blocks = (inputs + 31) / 32, pair = tile / 2 * 2, tiles = least(2, (count + 15) / 16 - pair);
  to += pair * blocks * 512 + tile % 2 * 512;
  for (int64_t block = 0; block < blocks; ++block, to += tiles * 512)
    arrange_tile(rows + 16 * tile * inputs + 32 * block, inputs, least(16, count - 16 * tile),
                 least(32, inputs - 32 * block), to);
}

template <int n>
struct Tiles {
  static constexpr int count = n;
};

// Of kLinearRows / tiles rows, by 16·tiles columns; the block that is not whole comes from `last`.
template <int tiles>
void product(const uint16_t* rows, const uint16_t* last, int64_t inputs, const uint16_t* columns, float* sums) {
  zero_sums();
  columns = add_products<tiles>(rows, inputs, inputs / 32, columns);
  if (inputs % 32) add_products<tiles>(last, 32, 1, columns);
  store_sums<tiles>(sums);
}

void copy_last(const uint16_t* rows, int64_t inputs, uint16_t* last) {
  const auto mask = static_cast<__mmask32>((1u << inputs % 32) - 1);
  if (mask)
    for (int64_t i = 0; i < kLinearRows; ++i)
      _mm512_store_si512(last + 32 * i, _mm512_maskz_loadu_epi16(mask, rows + i * inputs + inputs / 32 * 32));
}

// Sums [kLinearRows / tiles outputs, 16·tiles rows of y].
template <int tiles>
void finish_few(const Linear& work, const float* sums, int64_t row, int64_t first, int64_t written) {
  const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(16 * tiles));
  for (int64_t i = 0; i < kLinearRows / tiles; i += 16) {
    const int64_t output = first + i;
    if (written - output >= 16 || output >= work.outputs) continue;
    const auto mask = static_cast<__mmask16>(from_on(written - output) & first_of(work.outputs - output));
    __m512 bias = _mm512_setzero_ps();
    if (work.bias) bias = to_float(_mm256_maskz_loadu_epi16(mask, work.bias + output));
    for (int64_t j = 0; j < least(16 * tiles, work.rows - row); ++j) {
      const __m512 value = _mm512_add_ps(_mm512_i32gather_ps(places, sums + 16 * tiles * i + j, 4), bias);
      _mm256_mask_storeu_epi16(work.y + (row + j) * work.outputs + output, mask, rounded(value));
    }
  }
}

// Sums [kLinearRows / tiles rows of y, 16·tiles outputs].
template <int tiles>
void finish_many(const Linear& work, const float* sums, int64_t output, int64_t first, int64_t written) {
  __mmask16 mask[tiles];
  __m512 bias[tiles];
  for (int t = 0; t < tiles; ++t) {
    mask[t] = first_of(work.outputs - output - 16 * t);
    bias[t] = _mm512_setzero_ps();
    if (work.bias) bias[t] = to_float(_mm256_maskz_loadu_epi16(mask[t], work.bias + output + 16 * t));
  }
  for (int64_t i = written > first ? written - first : 0; i < kLinearRows / tiles; ++i)
    for (int t = 0; t < tiles; ++t) {
      const __m512 value = _mm512_add_ps(_mm512_load_ps(sums + 16 * (tiles * i + t)), bias[t]);
      _mm256_mask_storeu_epi16(work.y + (first + i) * work.outputs + output + 16 * t, mask[t], rounded(value));
    }
}

// Of kLinearRows rows by `count` columns: finish(tiles, sums, column, row), row being the first of the sums' rows.
template <class Finish>
void multiply(const uint16_t* rows, const uint16_t* columns, int64_t count, int64_t inputs, const Finish& finish) {
  alignas(64) float sums[kLinearRows * 16];
  alignas(64) uint16_t last[kLinearRows * 32];
  copy_last(rows, inputs, last);
  for (int64_t column = 0; column < count; column += 32) {
    const uint16_t* tile = columns + column * ((inputs + 31) / 32) * 32;
    if (count - column <= 16) {
      product<1>(rows, last, inputs, tile, sums);
      finish(Tiles<1>(), sums, column, 0);
      continue;
    }
    for (int64_t row = 0; row < kLinearRows; row += kLinearRows / 2) {
      product<2>(rows + row * inputs, last + 32 * row, inputs, tile, sums);
      finish(Tiles<2>(), sums, column, row);
    }
  }
}

void of_few(const Linear& work, int64_t first, int64_t written) {
  multiply(work.weight + first * work.inputs, work.x, work.rows, work.inputs,
           [&](auto tiles, const float* sums, int64_t column, int64_t row) {
             finish_few<tiles.count>(work, sums, column, first + row, written);
           });
}

void of_many(const Linear& work, int64_t first, int64_t written) {
  multiply(work.x + first * work.inputs, work.weight, work.outputs, work.inputs,
           [&](auto tiles, const float* sums, int64_t column, int64_t row) {
             finish_many<tiles.count>(work, sums, column, first + row, written);
           });
}

}  // namespace

const LinearIsa kLinearAmx = {begin_tiles, end_tiles, arrange, of_few, of_many};

}  // namespace meddiff
