// Winograd's F(2³, 3³), written once for all instruction sets: Lavin & Gray, "Fast Algorithms for Convolutional Neural
// Networks" (CVPR 2016), along three axes. Of each 8 outputs and pair of channels it takes 64 products instead of 216.
// Each winograd_<isa>.cpp includes this file, defines a vector type, and is compiled with machine flags of its own.
// Everything here has internal linkage and calls nothing of the C++ library: of an inline function compiled in several
// files the linker keeps one copy, and that could be the AVX-512 one.
//
// An Isa has: V, a vector of `lanes` floats; load, store, set1, add, sub, mul, fma(a, b, c) = a·b + c; `rows` × `columns`
// vectors of a product that the registers hold.
#pragma once

#include "winograd.h"

namespace meddiff {
namespace {

template <class Isa>
class Winograd {
 public:
  using V = typename Isa::V;

  static void transform_weight(const float* taps, int64_t numbers, float* u) {
    const V half = Isa::set1(0.5f);
    for (int64_t i = 0; i < numbers; i += Isa::lanes) {
      V a[4][4][4];
      for (int d = 0; d < 3; ++d)
        for (int h = 0; h < 3; ++h)
          for (int w = 0; w < 3; ++w) a[d][h][w] = Isa::load(taps + (d * 9 + h * 3 + w) * numbers + i);
      const auto along = [&](V& g0, V& g1, V& g2, V& g3) {
        const V ends = Isa::add(g0, g2), middle = g1;
        g3 = g2;
        g1 = Isa::mul(half, Isa::add(ends, middle));
        g2 = Isa::mul(half, Isa::sub(ends, middle));
      };
      for (int d = 0; d < 3; ++d)
        for (int h = 0; h < 3; ++h) along(a[d][h][0], a[d][h][1], a[d][h][2], a[d][h][3]);
      for (int d = 0; d < 3; ++d)
        for (int w = 0; w < 4; ++w) along(a[d][0][w], a[d][1][w], a[d][2][w], a[d][3][w]);
      for (int h = 0; h < 4; ++h)
        for (int w = 0; w < 4; ++w) along(a[0][h][w], a[1][h][w], a[2][h][w], a[3][h][w]);
      for (int p = 0; p < 64; ++p) Isa::store(u + p * numbers + i, a[p / 16][p / 4 % 4][p % 4]);
    }
  }

  static void convolve(const WinogradTile& tile, int64_t first, int64_t count, float* memory) {
    const int64_t c = tile.channels, o = tile.outputs;
    float *v = memory, *m = memory + 64 * count * c;  // [64, count, C] and [64, count, O]
    for (int64_t i = 0; i < count; ++i) take(tile, first + i, count * c, v + i * c);
    for (int p = 0; p < 64; ++p) multiply(v + p * count * c, tile.u + p * c * o, m + p * count * o, count, c, o);
    for (int64_t i = 0; i < count; ++i) give(tile, first + i, count * o, m + i * o);
  }

 private:
  struct Place {
    int64_t d, h, w;

    Place(const WinogradTile& tile, int64_t block) {
      const int64_t along_w = tile.across(tile.width), along_h = tile.across(tile.height);
      w = 2 * (block % along_w), h = 2 * (block / along_w % along_h), d = 2 * (block / along_w / along_h);
    }
  };

  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  static void of_inputs(V& a, V& b, V& c, V& d) {
    const V first = Isa::sub(a, c), second = Isa::add(b, c), third = Isa::sub(c, b);
    d = Isa::sub(b, d);
    a = first, b = second, c = third;
  }

  // The 64 points of a block's inputs, `stride` apart. Where the tile ends, what only outputs beyond it take is any
  // number of the tile.
  static void take(const WinogradTile& tile, int64_t block, int64_t stride, float* v) {
    const Place at(tile, block);
    const int64_t c = tile.channels, row = (tile.width + 2) * c;
    const float* rows[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t d = least(at.d + i / 4, tile.depth + 1), h = least(at.h + i % 4, tile.height + 1);
      rows[i] = tile.x + (d * (tile.height + 2) + h) * row;
    }
    for (int64_t channel = 0; channel < c; channel += Isa::lanes) {
      V of_row[16][4];
      for (int w = 0; w < 4; ++w) {
        const int64_t voxel = least(at.w + w, tile.width + 1) * c + channel;
        V a[4][4];
        for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = Isa::load(rows[i] + voxel);
        for (int h = 0; h < 4; ++h) of_inputs(a[0][h], a[1][h], a[2][h], a[3][h]);
        for (int d = 0; d < 4; ++d) of_inputs(a[d][0], a[d][1], a[d][2], a[d][3]);
        for (int i = 0; i < 16; ++i) of_row[i][w] = a[i / 4][i % 4];
      }
      for (int i = 0; i < 16; ++i) {
        of_inputs(of_row[i][0], of_row[i][1], of_row[i][2], of_row[i][3]);
        for (int w = 0; w < 4; ++w) Isa::store(v + (4 * i + w) * stride + channel, of_row[i][w]);
      }
    }
  }

  static void of_outputs(V a, V b, V c, V d, V& first, V& second) {
    first = Isa::add(Isa::add(a, b), c);
    second = Isa::sub(Isa::sub(b, c), d);
  }

  static void give(const WinogradTile& tile, int64_t block, int64_t stride, const float* m) {
    const Place at(tile, block);
    const int64_t o = tile.outputs;
    const int64_t depth = least(2, tile.depth - at.d), height = least(2, tile.height - at.h);
    const int64_t width = least(2, tile.width - at.w);
    for (int64_t channel = 0; channel < o; channel += Isa::lanes) {
      V of_plane[4][2][2];
      for (int d = 0; d < 4; ++d) {
        V of_row[4][2];
        for (int h = 0; h < 4; ++h) {
          const float* p = m + (16 * d + 4 * h) * stride + channel;
          of_outputs(Isa::load(p), Isa::load(p + stride), Isa::load(p + 2 * stride), Isa::load(p + 3 * stride),
                     of_row[h][0], of_row[h][1]);
        }
        for (int w = 0; w < 2; ++w)
          of_outputs(of_row[0][w], of_row[1][w], of_row[2][w], of_row[3][w], of_plane[d][0][w], of_plane[d][1][w]);
      }
      const V bias = tile.bias ? Isa::load(tile.bias + channel) : Isa::set1(0);
      V y[2][2][2];
      for (int h = 0; h < 2; ++h)
        for (int w = 0; w < 2; ++w)
          of_outputs(of_plane[0][h][w], of_plane[1][h][w], of_plane[2][h][w], of_plane[3][h][w], y[0][h][w],
                     y[1][h][w]);
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t h = 0; h < height; ++h)
          for (int64_t w = 0; w < width; ++w) {
            const int64_t voxel = ((at.d + d) * tile.height + at.h + h) * tile.width + at.w + w;
            Isa::store(tile.y + voxel * o + channel, Isa::add(y[d][h][w], bias));
          }
    }
  }

  // product [rows, O] = a [rows, C] · b [C, O]
  static void multiply(const float* a, const float* b, float* product, int64_t rows, int64_t c, int64_t o) {
    for (int64_t column = 0; column < o;) {
      const int64_t vectors = least(Isa::columns, (o - column) / Isa::lanes);
      with_columns<Isa::columns>(vectors, a, b + column, product + column, rows, c, o);
      column += vectors * Isa::lanes;
    }
  }

  template <int kColumns>
  static void with_columns(int64_t columns, const float* a, const float* b, float* product, int64_t rows, int64_t c,
                           int64_t o) {
    if constexpr (kColumns > 1) {
      if (columns < kColumns) return with_columns<kColumns - 1>(columns, a, b, product, rows, c, o);
    }
    const int64_t parts = (rows + Isa::rows - 1) / Isa::rows;
    for (int64_t i = 0, done = 0; i < parts; ++i) {  // of equal length as far as possible
      const int64_t part = (rows - done + parts - i - 1) / (parts - i);
      with_rows<Isa::rows, kColumns>(part, a + done * c, b, product + done * o, c, o);
      done += part;
    }
  }

  template <int kRows, int kColumns>
  static void with_rows(int64_t rows, const float* a, const float* b, float* product, int64_t c, int64_t o) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return with_rows<kRows - 1, kColumns>(rows, a, b, product, c, o);
    }
    V sums[kRows][kColumns];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j) sums[i][j] = Isa::set1(0);
    for (int64_t k = 0; k < c; ++k) {
      V of_b[kColumns];
      for (int j = 0; j < kColumns; ++j) of_b[j] = Isa::load(b + k * o + j * Isa::lanes);
      for (int i = 0; i < kRows; ++i) {
        const V of_a = Isa::set1(a[i * c + k]);
        for (int j = 0; j < kColumns; ++j) sums[i][j] = Isa::fma(of_a, of_b[j], sums[i][j]);
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j) Isa::store(product + i * o + j * Isa::lanes, sums[i][j]);
  }
};

template <class Isa>
constexpr WinogradIsa winograd_isa(const char* name) {
  return {name, Isa::lanes, Winograd<Isa>::transform_weight, Winograd<Isa>::convolve};
}

}  // namespace
}  // namespace meddiff
