// Products of tiles in bfloat16 on processors with AMX: 16 rows of 32 numbers by 16 columns of as many, added in float32.
// The second tile has pairs of a column's numbers one behind the other: [16 pairs][16 columns][2]. Everything here has
// internal linkage, and calls nothing of the C++ library: see winograd_kernel.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace meddiff {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// no local variable: to GCC 12 the intrinsic does not read all of it
constexpr TileConfig kEightTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// in each thread, before and behind its products
inline void begin_tiles() { _tile_loadconfig(&kEightTiles); }
inline void end_tiles() { _tile_release(); }

inline __m512 to_float(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

// Sums in tiles 0 to 3: of 64 rows and one tile of columns, or of 32 rows and two.
inline void zero_sums() {
  __asm__ volatile("" ::: "memory");  // GCC does not know that the products below read memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// To them: rows `step` numbers apart, of `blocks` · 32 numbers, by columns [blocks][tiles][512]; returns what is behind
// these.
template <int tiles>
const uint16_t* add_products(const uint16_t* row, int64_t step, int64_t blocks, const uint16_t* columns) {
  for (const int64_t bytes = 2 * step; blocks > 0; --blocks, row += 32, columns += 512 * tiles) {
    _tile_loadd(7, columns, 64);
    _tile_loadd(4, row, bytes);
    _tile_loadd(5, row + 16 * step, bytes);
    if constexpr (tiles == 2) {
      _tile_loadd(6, columns + 512, 64);
      _tile_dpbf16ps(0, 4, 7);
      _tile_dpbf16ps(1, 4, 6);
      _tile_dpbf16ps(2, 5, 7);
      _tile_dpbf16ps(3, 5, 6);
    } else {
      _tile_loadd(6, row + 32 * step, bytes);
      _tile_dpbf16ps(0, 4, 7);
      _tile_loadd(4, row + 48 * step, bytes);
      _tile_dpbf16ps(1, 5, 7);
      _tile_dpbf16ps(2, 6, 7);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  return columns;
}

// To [64, 16] or [32, 32].
template <int tiles>
void store_sums(float* sums) {
  constexpr int64_t kNext = tiles == 2 ? 16 : 256, kThird = 512, kBytes = 64 * tiles;
  _tile_stored(0, sums, kBytes);
  _tile_stored(1, sums + kNext, kBytes);
  _tile_stored(2, sums + kThird, kBytes);
  _tile_stored(3, sums + kThird + kNext, kBytes);
}

// The second tile of a product: 16 columns of `count` ≤ 32 numbers, from [columns, ·] of stride `column`, with zeros
// where there are none. It is a transposition of pairs.
inline void arrange_tile(const uint16_t* from, int64_t column, int64_t columns, int64_t count, uint16_t* tile) {
  __m512i a[16], b[16];
  const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  for (int i = 0; i < 16; ++i)
    a[i] = i < columns ? _mm512_maskz_loadu_epi16(mask, from + i * column) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)  // rows 4i … of quarters now, whose quarters change places
    for (int j = 0; j < 4; ++j) {
      b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    const int row = j % 4 + j / 4 * 4;
    _mm512_storeu_si512(tile + 32 * row, _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88));
    _mm512_storeu_si512(tile + 32 * (row + 8), _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd));
  }
}

}  // namespace
}  // namespace meddiff
