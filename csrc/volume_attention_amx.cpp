// Softmax by blocks of keys: scores of 32 queries, their exponentials in place of them, and what these take of the
// values. Exponentials are good to 9e-5, which is little beside their rounding to bfloat16.
#include "volume_attention.h"

#include "amx.h"

namespace meddiff {
namespace {

constexpr int64_t kQueries = 32, kKeys = 256;

// 2^f = 1 + f·(kExp2[0] + f·(kExp2[1] + f·kExp2[2])) for 0 <= f < 1, to within 8.7e-5 of it
constexpr float kExp2[3] = {0x1.63e62ap-1f, 0x1.d23acap-3f, 0x1.3ba4b0p-4f};

__m512 exp2_of(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 power = _mm512_fmadd_ps(f, _mm512_set1_ps(kExp2[2]), _mm512_set1_ps(kExp2[1]));
  power = _mm512_fmadd_ps(f, power, _mm512_set1_ps(kExp2[0]));
  return _mm512_scalef_ps(_mm512_fmadd_ps(f, power, _mm512_set1_ps(1)), x);
}

__mmask16 first_of(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0);
}

__m256i load_row(const uint16_t* from, int64_t count) { return _mm256_maskz_loadu_epi16(first_of(count), from); }

void arrange(const VolumeAttentionHead& head, int64_t group) {
  const int64_t first = 32 * group, count = head.tokens - first < 32 ? head.tokens - first : 32;
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t d = 0; d < head.deep(); ++d) {
      const int64_t columns = count - 16 * half < 16 ? count - 16 * half : 16;
      arrange_tile(head.k + (first + 16 * half) * head.row + 32 * d, head.row, columns,
                   head.dim - 32 * d < 32 ? head.dim - 32 * d : 32,
                   head.keys + ((2 * group + half) * head.deep() + d) * 512);
    }
  for (int64_t w = 0; w < head.wide(); ++w)
    for (int64_t pair = 0; pair < 16; ++pair) {
      __m512i both = _mm512_setzero_si512();
      const uint16_t* at = head.v + (first + 2 * pair) * head.row + 16 * w;
      if (2 * pair < count) both = _mm512_cvtepu16_epi32(load_row(at, head.dim - 16 * w));
      if (2 * pair + 1 < count) {
        const __m512i second = _mm512_cvtepu16_epi32(load_row(at + head.row, head.dim - 16 * w));
        both = _mm512_or_si512(both, _mm512_slli_epi32(second, 16));
      }
      _mm512_storeu_si512(head.values + (group * head.wide() + w) * 512 + 32 * pair, both);
    }
}

// c [32, 32] of stride `row` = Σ a [32, 32·deep] of stride `a_row` by two columns of tiles b, `next` numbers apart, from
// tile to tile `step`. With one column of tiles the second one is the first again.
void multiply(const uint16_t* a, int64_t a_row, int64_t deep, const uint16_t* b, int64_t next, int64_t step, float* c,
              int64_t row) {
  zero_sums();
  for (int64_t d = 0; d < deep; ++d, a += 32, b += step) {
    _tile_loadd(4, a, 2 * a_row);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + next, 64);
    _tile_loadd(5, a + 16 * a_row, 2 * a_row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * row);
  _tile_stored(1, c + 16, 4 * row);
  _tile_stored(2, c + 16 * row, 4 * row);
  _tile_stored(3, c + 16 * row + 16, 4 * row);
}

// Of a row of scores, rounded; `top` becomes the largest score so far, `change` what exp2 of rescales earlier sums by.
template <bool whole>
void exponentials(const float* scores, int64_t keys, float scale, float& top, float& change, float& sum,
                  uint16_t* powers) {
  const int64_t count = whole ? kKeys : keys;
  const auto mask = [&](int64_t j) { return whole ? static_cast<__mmask16>(0xffff) : first_of(count - j); };
  __m512 largest = _mm512_set1_ps(top), sums = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; j += 16)
    largest = _mm512_mask_max_ps(largest, mask(j), _mm512_load_ps(scores + j), largest);
  const float peak = _mm512_reduce_max_ps(largest);
  change = top == peak ? 0 : (top - peak) * scale;
  top = peak;
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(peak * scale);
  for (int64_t j = 0; j < (count + 31) / 32 * 32; j += 16) {
    const __m512 score = _mm512_fmsub_ps(_mm512_load_ps(scores + j), factor, shift);
    const __m512 power = _mm512_maskz_mov_ps(mask(j), exp2_of(score));
    sums = _mm512_add_ps(sums, power);
    const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(power));
    _mm256_store_si256(reinterpret_cast<__m256i*>(powers + j), rounded);
  }
  sum = _mm512_reduce_add_ps(sums);
}

void attend(const VolumeAttentionHead& head, int64_t first) {
  const int64_t deep = head.deep(), wide = head.wide(), q_row = 32 * deep, sum_row = 32 * ((wide + 1) / 2);
  const int64_t queries = head.tokens - first < kVolumeQueries ? head.tokens - first : kVolumeQueries;
  alignas(64) uint16_t q[kVolumeQueries * kVolumeHeadDim];
  alignas(64) float sums[kVolumeQueries * kVolumeHeadDim], tops[kVolumeQueries], totals[kVolumeQueries];
  alignas(64) float scores[kQueries * kKeys], part[kQueries * 32], rescale[kQueries];
  alignas(64) uint16_t powers[kQueries * kKeys];
  for (int64_t i = 0; i < kVolumeQueries; ++i) {
    tops[i] = -__builtin_inff(), totals[i] = 0;
    for (int64_t c = 0; c < q_row; c += 16) {
      const int64_t count = i < queries ? head.dim - c : 0;
      const __m256i numbers = load_row(head.q + (first + (count > 0 ? i : 0)) * head.row + c, count);
      _mm256_store_si256(reinterpret_cast<__m256i*>(q + i * q_row + c), numbers);
    }
  }
  for (int64_t i = 0; i < kVolumeQueries * sum_row; i += 16) _mm512_store_ps(sums + i, _mm512_setzero_ps());

  for (int64_t key = 0; key < head.tokens; key += kKeys) {
    const int64_t keys = head.tokens - key < kKeys ? head.tokens - key : kKeys, groups = (keys + 31) / 32;
    for (int64_t query = 0; query < queries; query += kQueries) {
      for (int64_t g = 0; g < groups; ++g)
        multiply(q + query * q_row, q_row, deep, head.keys + (key / 32 + g) * 2 * deep * 512, deep * 512, 512,
                 scores + 32 * g, kKeys);
      float* const top = tops + query;
      float* const total = totals + query;
      for (int64_t i = 0; i < kQueries; ++i) {
        const auto row = keys == kKeys ? exponentials<true> : exponentials<false>;
        row(scores + i * kKeys, keys, head.scale, top[i], rescale[i], part[i], powers + i * kKeys);
      }
      for (int64_t i = 0; i < kQueries; i += 16) {
        const __m512 factor = exp2_of(_mm512_load_ps(rescale + i));
        _mm512_store_ps(rescale + i, factor);
        _mm512_store_ps(total + i, _mm512_fmadd_ps(_mm512_load_ps(total + i), factor, _mm512_load_ps(part + i)));
      }
      for (int64_t w = 0; w < wide; w += 2) {
        multiply(powers, kKeys, groups, head.values + (key / 32 * wide + w) * 512, w + 1 < wide ? 512 : 0, wide * 512,
                 part, 32);
        for (int64_t i = 0; i < kQueries; ++i)
          for (int64_t c = 0; c < 32; c += 16) {
            float* sum = sums + (query + i) * sum_row + 16 * w + c;
            const __m512 factor = _mm512_set1_ps(rescale[i]);
            _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_load_ps(sum), factor, _mm512_load_ps(part + 32 * i + c)));
          }
      }
    }
  }
  for (int64_t i = 0; i < queries; ++i)
    for (int64_t c = 0; c < head.dim; c += 16) {
      const __m512 value = _mm512_div_ps(_mm512_load_ps(sums + i * sum_row + c), _mm512_set1_ps(totals[i]));
      _mm256_mask_storeu_epi16(head.out + (first + i) * head.out_row + c, first_of(head.dim - c),
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    }
}

}  // namespace

const VolumeAttentionIsa kVolumeAttentionAmx = {begin_tiles, end_tiles, arrange, attend};

}  // namespace meddiff
