// Attention in one window on the CPU, written once for all instruction sets. Each window_attention_<isa>.cpp includes
// this file, defines a vector type, and is compiled with machine flags of its own. Everything here has internal linkage
// and calls nothing of the C++ library: of an inline function compiled in several files the linker keeps one copy, and
// that could be the AVX-512 one.
//
// One query per lane, so that nothing is ever reduced across lanes; keys and values are broadcast. Where no score can
// be large, exponentials are taken of the scores as they are, else the softmax is the online one, rescaled once per
// block of keys. The gradients of keys and values are found the other way round, one key per lane.
//
// An Isa has: V, a vector of `lanes` floats; `groups` vectors that share each broadcast; `unroll` keys whose scores are
// in flight together; `columns` of v accumulated together in registers; load, store, set1, add, sub, mul, div,
// fma(a, b, c) = a·b + c, max(a, b) = a > b ? a : b, and exp2 of numbers up to 126, NaN for NaN.
#pragma once

#include "window_attention.h"

namespace meddiff {
namespace {

// 2^f = 1 + f·(kExp2[0] + f·(kExp2[1] + …)) for |f| <= 1/2, to within 1.1e-7 of it.
constexpr float kExp2[5] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};

template <class Isa>
class WindowAttention {
 public:
  static void attend(const float* q, const float* k, const float* v, int64_t tokens, int64_t dim, float* out,
                     float* log_sum) {
    const float longest = largest_magnitude(k, tokens * dim);
    const bool tame = largest_magnitude(v, tokens * dim) < 0x1p64f;
    for (int64_t first = 0; first < tokens; first += kTile) {
      const int64_t queries = tokens - first < kTile ? tokens - first : kTile;
      alignas(64) float query[kWindowHeadDim * kTile];  // [dim, kTile]
      spread(q + first * dim, queries, dim, query);
      bool small = tame;  // by Hölder's inequality; a query with NaN is not
      for (int64_t l = 0; l < kTile; ++l) {
        float sum = 0;
        for (int64_t c = 0; c < dim; ++c) sum += __builtin_fabsf(query[c * kTile + l]);
        small &= sum * longest <= kSmall;
      }
      const auto attend = small ? attend_tile<true> : attend_tile<false>;
      attend(query, queries, k, v, tokens, dim, out + first * dim, log_sum + first);
    }
  }

  static void differentiate(const float* q, const float* k, const float* v, const float* grad, const float* delta,
                            const float* log_sum, int64_t tokens, int64_t dim, float* dq, float* dk, float* dv) {
    alignas(64) float a[kWindowHeadDim * kTile], b[kWindowHeadDim * kTile];          // [dim, kTile]
    alignas(64) float sum_a[kWindowHeadDim * kTile], sum_b[kWindowHeadDim * kTile];  // [dim, kTile]
    alignas(64) float p[kKeys * kTile], ds[kKeys * kTile];                           // [row, kTile]
    V one[G];
    for (int g = 0; g < G; ++g) one[g] = Isa::set1(1);
    const auto as_it_is = [](V score, int) { return score; };

    for (int64_t first = 0; first < tokens; first += kTile) {
      const int64_t lanes = tokens - first < kTile ? tokens - first : kTile;
      float tops[kTile], deltas[kTile];
      spread(log_sum + first, lanes, 1, tops);
      spread(delta + first, lanes, 1, deltas);
      spread(q + first * dim, lanes, dim, a);
      spread(grad + first * dim, lanes, dim, b);
      for (int64_t i = 0; i < dim * kTile; ++i) sum_a[i] = 0;
      for (int64_t row = 0; row < tokens; row += kKeys) {
        const int64_t rows = tokens - row < kKeys ? tokens - row : kKeys;
        all_scores(a, k + row * dim, rows, dim, p, as_it_is);
        all_scores(b, v + row * dim, rows, dim, ds, as_it_is);
        for (int64_t j = 0; j < rows; ++j)
          for (int g = 0; g < G; ++g)
            slopes(p, ds, j * kTile + g * Isa::lanes, Isa::load(tops + g * Isa::lanes),
                   Isa::load(deltas + g * Isa::lanes));
        accumulate_all(ds, k + row * dim, rows, dim, one, sum_a);
      }
      gather(sum_a, lanes, dim, dq + first * dim);

      spread(k + first * dim, lanes, dim, a);
      spread(v + first * dim, lanes, dim, b);
      for (int64_t i = 0; i < dim * kTile; ++i) sum_a[i] = sum_b[i] = 0;
      for (int64_t row = 0; row < tokens; row += kKeys) {
        const int64_t rows = tokens - row < kKeys ? tokens - row : kKeys;
        all_scores(a, q + row * dim, rows, dim, p, as_it_is);
        all_scores(b, grad + row * dim, rows, dim, ds, as_it_is);
        for (int64_t i = 0; i < rows; ++i)
          for (int g = 0; g < G; ++g)
            slopes(p, ds, i * kTile + g * Isa::lanes, Isa::set1(log_sum[row + i]), Isa::set1(delta[row + i]));
        accumulate_all(ds, q + row * dim, rows, dim, one, sum_a);
        accumulate_all(p, grad + row * dim, rows, dim, one, sum_b);
      }
      gather(sum_a, lanes, dim, dk + first * dim);
      gather(sum_b, lanes, dim, dv + first * dim);
    }
  }

 private:
  using V = typename Isa::V;
  static constexpr int G = Isa::groups;
  static constexpr int64_t kTile = Isa::lanes * G;  // queries
  static constexpr int64_t kKeys = 64;
  static constexpr float kSmall = 32;  // of this magnitude scores need no maximum: 2⁻³² to 2³² are far from the ends

  // SMALL: all scores are of that magnitude. query is [dim, kTile]
  template <bool SMALL>
  static void attend_tile(const float* query, int64_t queries, const float* k, const float* v, int64_t tokens,
                          int64_t dim, float* out, float* log_sum) {
    alignas(64) float sum[kWindowHeadDim * kTile];  // [dim, kTile] Σ p·v
    alignas(64) float p[kKeys * kTile];             // [key, kTile] scores, then their exponentials
    for (int64_t i = 0; i < dim * kTile; ++i) sum[i] = 0;
    V top[G], total[G], rescale[G];
    for (int g = 0; g < G; ++g) top[g] = Isa::set1(SMALL ? 0 : -0x1p126f), total[g] = Isa::set1(0);
    for (int g = 0; g < G; ++g) rescale[g] = Isa::set1(1);

    for (int64_t key = 0; key < tokens; key += kKeys) {
      const int64_t keys = tokens - key < kKeys ? tokens - key : kKeys;
      if constexpr (SMALL) {
        all_scores(query, k + key * dim, keys, dim, p, [&](V score, int g) {
          const V power = Isa::exp2(score);
          total[g] = Isa::add(total[g], power);
          return power;
        });
      } else {
        V largest[G];
        for (int g = 0; g < G; ++g) largest[g] = top[g];
        all_scores(query, k + key * dim, keys, dim, p, [&](V score, int g) {
          largest[g] = Isa::max(score, largest[g]);
          return score;
        });
        for (int g = 0; g < G; ++g) {
          rescale[g] = Isa::exp2(Isa::sub(top[g], largest[g]));
          total[g] = Isa::mul(total[g], rescale[g]);
          top[g] = largest[g];
        }
        for (int64_t j = 0; j < keys; ++j) {
          for (int g = 0; g < G; ++g) {
            float* at = p + j * kTile + g * Isa::lanes;
            const V power = Isa::exp2(Isa::sub(Isa::load(at), top[g]));
            total[g] = Isa::add(total[g], power);
            Isa::store(at, power);
          }
        }
      }
      accumulate_all(p, v + key * dim, keys, dim, rescale, sum);
    }

    float tops[kTile], totals[kTile];
    for (int g = 0; g < G; ++g) {
      Isa::store(tops + g * Isa::lanes, top[g]);
      Isa::store(totals + g * Isa::lanes, total[g]);
      for (int64_t c = 0; c < dim; ++c) {
        float* at = sum + c * kTile + g * Isa::lanes;
        Isa::store(at, Isa::div(Isa::load(at), total[g]));
      }
    }
    gather(sum, queries, dim, out);
    for (int64_t l = 0; l < queries; ++l) log_sum[l] = tops[l] + __builtin_log2f(totals[l]);
  }

  // Of the numbers; a NaN is passed over.
  static float largest_magnitude(const float* x, int64_t count) {
    float largest[Isa::lanes] = {}, result = 0;
    for (int64_t i = 0; i < count; ++i) {
      float& of_lane = largest[i % Isa::lanes];
      const float magnitude = __builtin_fabsf(x[i]);
      of_lane = magnitude > of_lane ? magnitude : of_lane;
    }
    for (const float of_lane : largest) result = of_lane > result ? of_lane : result;
    return result;
  }

  // Rows [count, dim] as lanes [dim, kTile], with 0 in those to spare.
  static void spread(const float* rows, int64_t count, int64_t dim, float* lanes) {
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t l = 0; l < kTile; ++l) lanes[c * kTile + l] = l < count ? rows[l * dim + c] : 0;
  }

  // The inverse.
  static void gather(const float* lanes, int64_t count, int64_t dim, float* rows) {
    for (int64_t l = 0; l < count; ++l)
      for (int64_t c = 0; c < dim; ++c) rows[l * dim + c] = lanes[c * kTile + l];
  }

  // p holds scores and becomes probabilities; ds holds grad·v and becomes the slope of the score.
  static void slopes(float* p, float* ds, int64_t at, V log_sum, V delta) {
    const V power = Isa::exp2(Isa::sub(Isa::load(p + at), log_sum));
    Isa::store(p + at, power);
    Isa::store(ds + at, Isa::mul(power, Isa::sub(Isa::load(ds + at), delta)));
  }

  template <class Finish>
  static void all_scores(const float* query, const float* k, int64_t keys, int64_t dim, float* p,
                         const Finish& finish) {
    const int64_t unrolled = keys - keys % Isa::unroll;
    scores<Isa::unroll>(query, k, unrolled, dim, p, finish);
    scores<1>(query, k + unrolled * dim, keys - unrolled, dim, p + unrolled * kTile, finish);
  }

  // sum = sum·rescale + Σⱼ p[j]·v[j] for all columns of v, in nearly equal shares.
  static void accumulate_all(const float* p, const float* v, int64_t keys, int64_t dim, const V* rescale, float* sum) {
    const int64_t chunks = (dim + Isa::columns - 1) / Isa::columns;
    for (int64_t i = 0, c = 0; i < chunks; ++i) {
      const int64_t count = (dim - c + chunks - i - 1) / (chunks - i);
      accumulate<Isa::columns>(count, p, v + c, keys, dim, rescale, sum + c * kTile);
      c += count;
    }
  }

  // Of the tile's scores against `keys` rows of k, a multiple of U, finish(scores, vector of the tile) into p.
  template <int U, class Finish>
  static void scores(const float* query, const float* k, int64_t keys, int64_t dim, float* p, const Finish& finish) {
    for (int64_t j = 0; j < keys; j += U, k += U * dim) {
      V s[U][G];
      for (int u = 0; u < U; ++u)
        for (int g = 0; g < G; ++g) s[u][g] = Isa::mul(Isa::load(query + g * Isa::lanes), Isa::set1(k[u * dim]));
      for (int64_t c = 1; c < dim; ++c) {
        for (int u = 0; u < U; ++u) {
          const V key = Isa::set1(k[u * dim + c]);
          for (int g = 0; g < G; ++g)
            s[u][g] = Isa::fma(Isa::load(query + c * kTile + g * Isa::lanes), key, s[u][g]);
        }
      }
      for (int u = 0; u < U; ++u) {
        for (int g = 0; g < G; ++g) Isa::store(p + (j + u) * kTile + g * Isa::lanes, finish(s[u][g], g));
      }
    }
  }

  // sum = sum·rescale + Σⱼ p[j]·v[j] for `count` columns of v, at most N.
  template <int N>
  static void accumulate(int64_t count, const float* p, const float* v, int64_t keys, int64_t dim, const V* rescale,
                         float* sum) {
    if constexpr (N > 1) {
      if (count < N) return accumulate<N - 1>(count, p, v, keys, dim, rescale, sum);
    }
    V a[N][G];
    for (int n = 0; n < N; ++n)
      for (int g = 0; g < G; ++g) a[n][g] = Isa::mul(Isa::load(sum + n * kTile + g * Isa::lanes), rescale[g]);
    for (int64_t j = 0; j < keys; ++j, p += kTile, v += dim) {
      for (int n = 0; n < N; ++n) {
        const V value = Isa::set1(v[n]);
        for (int g = 0; g < G; ++g) a[n][g] = Isa::fma(Isa::load(p + g * Isa::lanes), value, a[n][g]);
      }
    }
    for (int n = 0; n < N; ++n)
      for (int g = 0; g < G; ++g) Isa::store(sum + n * kTile + g * Isa::lanes, a[n][g]);
  }
};

}  // namespace
}  // namespace meddiff
