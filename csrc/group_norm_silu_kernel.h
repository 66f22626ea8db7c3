// GroupNorm with scale, shift and SiLU on the CPU, GELU and a blur, written once for all instruction sets. Each
// group_norm_silu_<isa>.cpp includes this file, defines a vector type, and is compiled with machine flags of its own.
// Everything here has internal linkage and calls nothing of the C++ library: of an inline function compiled in several
// files the linker keeps one copy, and that could be the AVX-512 one.
//
// An Isa has: V, a vector of `lanes` floats; load and store of float and of bfloat16 (as uint16_t, rounded to nearest
// even, NaN stays NaN); set1, add, sub, mul; fma(a, b, c) = a·b + c; max(a, b) = a > b ? a : b and min;
// inverse(a) = 1/a for a in [1, 2]; quick_inverse(a) = 1/a to within 2⁻¹⁴ of it for a in [1, 2¹²⁷);
// minus_abs(a) = −|a|; where_positive(a, b, c) = a > 0 ? b : c; round to an integer; times_power(a, n) = a·2ⁿ for
// integers n in [−126, 126].
#pragma once

#include "group_norm_silu.h"

namespace meddiff {
namespace {

// eʳ = 1 + r + r²·(kExp[0] + r·(kExp[1] + …)) for |r| <= ln 2 / 2, to within 4e-9 of it; kLn2 sums to ln 2, and an
// integer up to 127 times the first part is exact.
constexpr float kExp[5] = {0x1.fffffcp-2f, 0x1.55548ap-3f, 0x1.555916p-5f, 0x1.123fc6p-7f, 0x1.6a1a72p-10f};
constexpr float kLn2[2] = {0x1.63p-1f, -0x1.bd0106p-13f};
// 2ᶠ for |f| <= 1/2, to within 8e-5 of it.
constexpr float kQuickPower[4] = {0x1.fff692p-1f, 0x1.62f31ap-1f, 0x1.f0de1ap-3f, 0x1.c3f76p-5f};

constexpr float kGelu[2] = {0x1.988454p+0f, 0x1.2444f2p-4f};  // √(8/π)·{1, 0.044715}

template <class Isa>
class GroupNormSilu {
 public:
  static constexpr int kVectors = 4;  // at a time, so that a sum is not needed again before it is there
  static constexpr int64_t kStep = kVectors * Isa::lanes;

  template <class T>
  static constexpr GroupNormSiluKernels<T> kernels() {
    return {moments<T>, forward<T>, sums<T>, backward<T>, add<T>, gelu<T>, blur<T>};
  }

 private:
  using V = typename Isa::V;
  static constexpr int64_t kColumns = 2048;  // of which sums are kept at a time
  static constexpr int64_t kBlock = 8192;    // numbers that the first-level cache holds

  struct Sigmoid {
    V value, slope;
  };

  // Neither overflows nor cancels: both come from e^−|z|.
  static Sigmoid sigmoid(V z) {
    const V x = Isa::max(Isa::set1(-87), Isa::minus_abs(z));  // of a NaN and a number, the second
    const V n = Isa::round(Isa::mul(x, Isa::set1(0x1.715476p+0f)));
    const V r = Isa::fma(n, Isa::set1(-kLn2[1]), Isa::fma(n, Isa::set1(-kLn2[0]), x));
    V q = Isa::fma(r, Isa::set1(kExp[4]), Isa::set1(kExp[3]));
    for (int i = 2; i >= 0; --i) q = Isa::fma(r, q, Isa::set1(kExp[i]));
    const V one = Isa::set1(1);
    const V power = Isa::times_power(Isa::add(one, Isa::fma(Isa::mul(r, r), q, r)), n);
    const V inverse = Isa::inverse(Isa::add(one, power));
    return {Isa::mul(inverse, Isa::where_positive(z, one, power)), Isa::mul(power, Isa::mul(inverse, inverse))};
  }

  static V sigmoid_for(V z, float) { return sigmoid(z).value; }

  // To within 1.4e-4 of it, which is little beside the 2e-3 that rounding to bfloat16 takes away.
  static V sigmoid_for(V z, uint16_t) {
    const V x = Isa::max(Isa::set1(-125), Isa::min(Isa::set1(125), Isa::mul(z, Isa::set1(-0x1.715476p+0f))));
    const V n = Isa::round(x);
    const V f = Isa::sub(x, n);
    V q = Isa::fma(f, Isa::set1(kQuickPower[3]), Isa::set1(kQuickPower[2]));
    for (int i = 1; i >= 0; --i) q = Isa::fma(f, q, Isa::set1(kQuickPower[i]));
    return Isa::quick_inverse(Isa::add(Isa::set1(1), Isa::times_power(q, n)));
  }

  template <class T>
  static void moments(const T* x, int64_t repeats, int64_t width, double* mean, double* m2) {
    alignas(64) float sum[kColumns], rest[kColumns], square[kColumns];
    for (int64_t first = 0; first < width; first += kColumns) {
      const int64_t columns = width - first < kColumns ? width - first : kColumns;
      for (int64_t c = 0; c < columns; ++c) mean[first + c] = m2[first + c] = 0;
      const int64_t block = kBlock / columns > 8 ? kBlock / columns : 8;
      for (int64_t done = 0; done < repeats; done += block) {
        const int64_t count = repeats - done < block ? repeats - done : block;
        const T* rows = x + done * width + first;
        const V inverse = Isa::set1(1 / static_cast<float>(count));
        for (int64_t c = 0; c < columns; c += kStep) {
          V sums[kVectors], rests[kVectors], squares[kVectors];
          for (int v = 0; v < kVectors; ++v) sums[v] = rests[v] = squares[v] = Isa::set1(0);
          for (int64_t i = 0; i < count; ++i)
            for (int v = 0; v < kVectors; ++v)
              sums[v] = Isa::add(sums[v], Isa::load(rows + i * width + c + v * Isa::lanes));
          for (int v = 0; v < kVectors; ++v) sums[v] = Isa::mul(sums[v], inverse);
          for (int64_t i = 0; i < count; ++i) {
            for (int v = 0; v < kVectors; ++v) {
              const V d = Isa::sub(Isa::load(rows + i * width + c + v * Isa::lanes), sums[v]);
              rests[v] = Isa::add(rests[v], d);
              squares[v] = Isa::fma(d, d, squares[v]);
            }
          }
          for (int v = 0; v < kVectors; ++v) {
            const int64_t at = c + v * Isa::lanes;
            Isa::store(sum + at, sums[v]), Isa::store(rest + at, rests[v]), Isa::store(square + at, squares[v]);
          }
        }
        const double of_block = 1 / static_cast<double>(count);
        const double weight = static_cast<double>(count) / static_cast<double>(done + count);
        for (int64_t c = 0; c < columns; ++c) {  // `sum` is the block's mean rounded, which `rest` corrects
          const double correction = rest[c] * of_block;
          const double delta = sum[c] + correction - mean[first + c];
          mean[first + c] += delta * weight;
          m2[first + c] += square[c] - correction * rest[c] + delta * delta * (static_cast<double>(done) * weight);
        }
      }
    }
  }

  static V preactivation(V x, const GroupNormSiluFold& fold, int64_t c) {
    return Isa::fma(Isa::sub(x, Isa::load(fold.centre + c)), Isa::load(fold.gain + c), Isa::load(fold.offset + c));
  }

  static V gradient(V x, V dy, const GroupNormSiluFold& fold, int64_t c, bool silu) {
    if (!silu) return dy;
    const V z = preactivation(x, fold, c);
    const Sigmoid s = sigmoid(z);
    return Isa::mul(dy, Isa::fma(z, s.slope, s.value));
  }

  template <class T>
  static void forward(const T* x, int64_t repeats, int64_t width, const GroupNormSiluFold& fold, bool silu, T* y) {
    for (int64_t i = 0; i < repeats; ++i, x += width, y += width) {
      for (int64_t c = 0; c < width; c += Isa::lanes) {
        const V z = preactivation(Isa::load(x + c), fold, c);
        Isa::store(y + c, silu ? Isa::mul(z, sigmoid_for(z, T{})) : z);
      }
    }
  }

  template <class T>
  static void sums(const T* x, const T* dy, int64_t repeats, int64_t width, const GroupNormSiluFold& fold, bool silu,
                   double* of_dz, double* of_dz_x) {
    alignas(64) float sum[kColumns], product[kColumns];
    for (int64_t first = 0; first < width; first += kColumns) {
      const int64_t columns = width - first < kColumns ? width - first : kColumns;
      const int64_t block = kBlock / columns > 8 ? kBlock / columns : 8;
      for (int64_t c = 0; c < columns; ++c) of_dz[first + c] = of_dz_x[first + c] = 0;
      for (int64_t done = 0; done < repeats; done += block) {
        const int64_t end = repeats - done < block ? repeats : done + block;
        for (int64_t c = 0; c < columns; ++c) sum[c] = product[c] = 0;
        for (int64_t i = done; i < end; ++i) {
          for (int64_t c = 0; c < columns; c += Isa::lanes) {
            const int64_t at = i * width + first + c;
            const V value = Isa::load(x + at);
            const V dz = gradient(value, Isa::load(dy + at), fold, first + c, silu);
            const V d = Isa::sub(value, Isa::load(fold.centre + first + c));
            Isa::store(sum + c, Isa::add(Isa::load(sum + c), dz));
            Isa::store(product + c, Isa::fma(dz, d, Isa::load(product + c)));
          }
        }
        for (int64_t c = 0; c < columns; ++c) of_dz[first + c] += sum[c], of_dz_x[first + c] += product[c];
      }
    }
  }

  template <class T>
  static void backward(const T* x, const T* dy, int64_t repeats, int64_t width, const GroupNormSiluFold& fold,
                       const float* slope, const float* level, bool silu, T* dx) {
    for (int64_t i = 0; i < repeats; ++i, x += width, dy += width, dx += width) {
      for (int64_t c = 0; c < width; c += Isa::lanes) {
        const V value = Isa::load(x + c), dz = gradient(value, Isa::load(dy + c), fold, c, silu);
        const V d = Isa::sub(value, Isa::load(fold.centre + c));
        const V line = Isa::fma(d, Isa::load(slope + c), Isa::load(level + c));
        Isa::store(dx + c, Isa::fma(dz, Isa::load(fold.gain + c), line));
      }
    }
  }

  template <class T>
  static void add(const T* a, const T* b, int64_t count, T* y) {
    const int64_t whole = count - count % Isa::lanes;
    for (int64_t i = 0; i < whole; i += Isa::lanes) Isa::store(y + i, Isa::add(Isa::load(a + i), Isa::load(b + i)));
    if (whole == count) return;
    T rest[2][Isa::lanes] = {};
    for (int64_t j = whole; j < count; ++j) rest[0][j - whole] = a[j], rest[1][j - whole] = b[j];
    Isa::store(rest[0], Isa::add(Isa::load(rest[0]), Isa::load(rest[1])));
    for (int64_t j = whole; j < count; ++j) y[j] = rest[0][j - whole];
  }

  // x·Φ(x) ≈ x·sigmoid(x·(kGelu[0] + kGelu[1]·x²)), which is x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))
  template <class T>
  static V gelu_of(const T* x) {
    const V value = Isa::max(Isa::set1(-12), Isa::load(x));  // below that the result rounds to 0
    const V slope = Isa::fma(Isa::mul(value, value), Isa::set1(kGelu[1]), Isa::set1(kGelu[0]));
    return Isa::mul(value, sigmoid_for(Isa::mul(value, slope), T{}));
  }

  template <class T>
  static void gelu(T* x, int64_t count) {
    const int64_t whole = count - count % Isa::lanes;
    for (int64_t i = 0; i < whole; i += Isa::lanes) Isa::store(x + i, gelu_of(x + i));
    if (whole == count) return;
    T rest[Isa::lanes] = {};
    for (int64_t j = whole; j < count; ++j) rest[j - whole] = x[j];
    Isa::store(rest, gelu_of(rest));
    for (int64_t j = whole; j < count; ++j) x[j] = rest[j - whole];
  }

  static V one_two_one(V a, V b, V c) { return Isa::fma(Isa::set1(2), b, Isa::add(a, c)); }

  template <class T>
  static V across(const T* const* rows, int64_t i) {
    V planes[3];
    for (int p = 0; p < 3; ++p) {
      const T* const* of_plane = rows + 3 * p;
      planes[p] = one_two_one(Isa::load(of_plane[0] + i), Isa::load(of_plane[1] + i), Isa::load(of_plane[2] + i));
    }
    return one_two_one(planes[0], planes[1], planes[2]);
  }

  static V along(const float* line, int64_t channels) {
    const V sum = one_two_one(Isa::load(line), Isa::load(line + channels), Isa::load(line + 2 * channels));
    return Isa::mul(sum, Isa::set1(1.0f / 64));
  }

  template <class T>
  static void blur(const T* const* rows, int64_t count, int64_t channels, float* line, T* y) {
    const int64_t width = count + 2 * channels, wide = width - width % Isa::lanes, whole = count - count % Isa::lanes;
    for (int64_t i = 0; i < wide; i += Isa::lanes) Isa::store(line + i, across(rows, i));
    if (wide < width) {
      T rest[9][Isa::lanes] = {};
      const T* ends[9];
      for (int r = 0; r < 9; ++r) {
        for (int64_t i = wide; i < width; ++i) rest[r][i - wide] = rows[r][i];
        ends[r] = rest[r];
      }
      float last[Isa::lanes];
      Isa::store(last, across(ends, 0));
      for (int64_t i = wide; i < width; ++i) line[i] = last[i - wide];
    }
    for (int64_t i = 0; i < whole; i += Isa::lanes) Isa::store(y + i, along(line + i, channels));
    if (whole == count) return;
    float lines[3 * Isa::lanes] = {};
    for (int64_t i = whole; i < count; ++i)
      for (int k = 0; k < 3; ++k) lines[k * Isa::lanes + i - whole] = line[i + k * channels];
    T rest[Isa::lanes];
    Isa::store(rest, along(lines, Isa::lanes));
    for (int64_t i = whole; i < count; ++i) y[i] = rest[i - whole];
  }
};

}  // namespace
}  // namespace meddiff
