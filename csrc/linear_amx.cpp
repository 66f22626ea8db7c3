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

void of_few(const Linear& work, int64_t first, int64_t written) {
  alignas(64) float sums[kLinearRows * 16];
  alignas(64) uint16_t last[kLinearRows * 32];
  const uint16_t* weight = work.weight + first * work.inputs;
  copy_last(weight, work.inputs, last);
  for (int64_t row = 0; row < work.rows; row += 32) {
    const uint16_t* x = work.x + row * work.blocks() * 32;
    if (work.rows - row <= 16) {
      product<1>(weight, last, work.inputs, x, sums);
      finish_few<1>(work, sums, row, first, written);
      continue;
    }
    for (int64_t half = 0; half < kLinearRows; half += kLinearRows / 2) {
      product<2>(weight + half * work.inputs, last + 32 * half, work.inputs, x, sums);
      finish_few<2>(work, sums, row, first + half, written);
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

void of_many(const Linear& work, int64_t first, int64_t written) {
  alignas(64) float sums[kLinearRows * 16];
  alignas(64) uint16_t last[kLinearRows * 32];
  const uint16_t* x = work.x + first * work.inputs;
  copy_last(x, work.inputs, last);
  for (int64_t output = 0; output < work.outputs; output += 32) {
    const uint16_t* weight = work.weight + output * work.blocks() * 32;
    if (work.outputs - output <= 16) {
      product<1>(x, last, work.inputs, weight, sums);
      finish_many<1>(work, sums, output, first, written);
      continue;
    }
    for (int64_t half = 0; half < kLinearRows; half += kLinearRows / 2) {
      product<2>(x + half * work.inputs, last + 32 * half, work.inputs, weight, sums);
      finish_many<2>(work, sums, output, first + half, written);
    }
  }
}

}  // namespace

const LinearIsa kLinearAmx = {begin_tiles, end_tiles, arrange, of_few, of_many};

}  // namespace meddiff
