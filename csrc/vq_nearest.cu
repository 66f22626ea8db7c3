// Nearest code on the GPU: see vq_nearest.h for the two stages. A thread holds a few tokens in registers and reads the
// codes from shared memory, each value once for all its tokens. Up to 128 blocks of codes, so that a 128-bit mask says
// which of them still have to be compared exactly; it is cleared whenever a block beats all earlier ones by the slack.
//
// float64 must not be contracted into fused operations here (nvcc -fmad=false): the distances are those of the CPU.
// tests/csrc compiles this file for the host, with one host thread per CUDA thread.
#include "vq_nearest.h"

#ifndef MEDDIFF_LAUNCH
#define MEDDIFF_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(grid), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define MEDDIFF_MAX_GRID (int64_t{1} << 20)
#endif

namespace meddiff {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = 2;       // per thread
constexpr int kTileCodes = 64;   // in shared memory at a time
constexpr int kMaxBlocks = 128;  // bits of the mask

struct Problem {
  const float* z;
  int64_t size[5], stride[5];
  const float* codes;  // [K, C]
  int64_t n_codes;
  int64_t padded_codes;     // rows of `centred`, a multiple of kTileCodes
  int64_t padded_channels;  // columns of `centred`, >= C, filled up with zeros
  int64_t block_codes;      // codes per bit of the mask, a multiple of kTileCodes
  float* centre;            // [C]
  float* radius;            // [1] largest norm of a centred code; infinite if a code is not finite
  float* bias;              // [padded_codes] −|y|²/2; −inf for padding
  float* centred;           // [padded_codes, padded_channels] y = code − centre
  int64_t* index;

  __host__ __device__ int64_t tokens() const { return size[0] * size[2] * size[3] * size[4]; }

  __device__ const float* token(int64_t t) const {
    const int64_t w = t % size[4], h = t / size[4] % size[3];
    const int64_t d = t / (size[4] * size[3]) % size[2], b = t / (size[4] * size[3] * size[2]);
    return z + b * stride[0] + d * stride[2] + h * stride[3] + w * stride[4];
  }
};

// One block per channel.
__global__ void centre_kernel(Problem p) {
  __shared__ double partial[kThreads];
  const int64_t c = blockIdx.x, channels = p.size[1];
  double sum = 0;
  for (int64_t k = threadIdx.x; k < p.n_codes; k += kThreads) sum += p.codes[k * channels + c];
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kThreads; ++i) sum += partial[i];
  p.centre[c] = static_cast<float>(sum / static_cast<double>(p.n_codes));
}

// One thread per code.
__global__ void shift_kernel(Problem p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, channels = p.size[1];
  if (k >= p.padded_codes) return;
  double square = 0;
  for (int64_t c = 0; c < p.padded_channels; ++c) {
    const float y = k < p.n_codes && c < channels ? p.codes[k * channels + c] - p.centre[c] : 0.0f;
    p.centred[k * p.padded_channels + c] = y;
    square += static_cast<double>(y) * y;
  }
  p.bias[k] = k < p.n_codes ? static_cast<float>(-0.5 * square) : -HUGE_VALF;
}

// A single block.
__global__ void radius_kernel(Problem p) {
  __shared__ float partial[kThreads];
  float lowest = 0;
  for (int64_t k = threadIdx.x; k < p.n_codes; k += kThreads)
    if (!(p.bias[k] >= lowest)) lowest = p.bias[k] > -HUGE_VALF ? p.bias[k] : -HUGE_VALF;
  partial[threadIdx.x] = lowest;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kThreads; ++i) lowest = partial[i] < lowest ? partial[i] : lowest;
  // the bias is rounded: the next float up is at least the norm
  *p.radius = static_cast<float>(sqrt(-2.0 * lowest) * (1 + 0x1p-22));
}

// A token minus the centre: in registers for C > 0 (padded with zeros), read again each time for C = 0.
template <int C>
struct Shifted {
  float x[C];

  __device__ void load(const Problem& p, const float* z) {
#pragma unroll
    for (int c = 0; c < C; ++c) x[c] = c < p.size[1] ? z[c * p.stride[1]] - p.centre[c] : 0.0f;
  }
  __device__ float operator()(int64_t c) const { return x[c]; }
};

template <>
struct Shifted<0> {
  const float *z, *centre;
  int64_t stride;

  __device__ void load(const Problem& p, const float* token) {
    z = token;
    centre = p.centre;
    stride = p.stride[1];
  }
  __device__ float operator()(int64_t c) const { return z[c * stride] - centre[c]; }
};

template <int C>
__device__ float score(const Shifted<C>& x, const float* y, float bias, int64_t channels) {
  const int64_t n = C > 0 ? C : channels;
#pragma unroll
  for (int64_t c = 0; c < n; ++c) bias = fmaf(x(c), y[c], bias);
  return bias;
}

// What the filter knows of a token so far. Tests are negated so that an infinite or NaN slack marks every block.
struct Candidates {
  float largest, slack;
  uint64_t low, high;  // marked blocks

  __device__ void offer(int64_t block, float top) {
    if (top > largest + slack) low = high = 0;
    if (!(top < largest - slack)) {
      const uint64_t bit = uint64_t{1} << (block & 63);
      low |= block < 64 ? bit : 0;
      high |= block < 64 ? 0 : bit;
    }
    largest = fmaxf(top, largest);
  }
};

template <int C>
__device__ int64_t refine(const Problem& p, const Shifted<C>& x, const float* z, const Candidates& found) {
  const float limit = found.largest - found.slack;
  double nearest = HUGE_VAL;
  int64_t index = 0;
  for (int64_t block = 0; block < kMaxBlocks; ++block) {
    if (!((block < 64 ? found.low : found.high) >> (block & 63) & 1)) continue;
    const int64_t begin = block * p.block_codes;
    const int64_t end = begin + p.block_codes < p.n_codes ? begin + p.block_codes : p.n_codes;
    for (int64_t k = begin; k < end; ++k) {
      if (score(x, p.centred + k * p.padded_channels, p.bias[k], p.size[1]) < limit) continue;
      double distance = 0;
      for (int64_t c = 0; c < p.size[1]; ++c) {
        const double difference =
            static_cast<double>(z[c * p.stride[1]]) - static_cast<double>(p.codes[k * p.size[1] + c]);
        distance += difference * difference;
      }
      if (distance < nearest) {
        nearest = distance;
        index = k;
      }
    }
  }
  return index;
}

template <int C>
__global__ void search_kernel(Problem p) {
  alignas(16) __shared__ float tile[C > 0 ? kTileCodes * C : 1];
  __shared__ float bias[kTileCodes];
  const int64_t tokens = p.tokens(), step = static_cast<int64_t>(kThreads) * kTokens;
  for (int64_t first = blockIdx.x * step; first < tokens; first += gridDim.x * step) {
    const float* z[kTokens];
    Shifted<C> x[kTokens];
    Candidates found[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int64_t t = first + i * kThreads + threadIdx.x;
      z[i] = p.token(t < tokens ? t : tokens - 1);
      x[i].load(p, z[i]);
      double square = 0;
      for (int64_t c = 0; c < (C > 0 ? C : p.size[1]); ++c) square += static_cast<double>(x[i](c)) * x[i](c);
      found[i] = {-HUGE_VALF, static_cast<float>(vq_nearest_slack(sqrt(square), *p.radius, p.size[1])), 0, 0};
    }

    for (int64_t block = 0; block * p.block_codes < p.padded_codes; ++block) {
      float top[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) top[i] = -HUGE_VALF;
      const int64_t begin = block * p.block_codes;
      const int64_t end = begin + p.block_codes < p.padded_codes ? begin + p.block_codes : p.padded_codes;
      for (int64_t k = begin; k < end; k += kTileCodes) {
        __syncthreads();
        for (int i = threadIdx.x; i < kTileCodes * C; i += kThreads) tile[i] = p.centred[k * C + i];
        for (int i = threadIdx.x; i < kTileCodes; i += kThreads) bias[i] = p.bias[k + i];
        __syncthreads();
#pragma unroll 4
        for (int j = 0; j < kTileCodes; ++j) {
          const float* y = C > 0 ? tile + j * C : p.centred + (k + j) * p.padded_channels;
#pragma unroll
          for (int i = 0; i < kTokens; ++i) top[i] = fmaxf(score(x[i], y, bias[j], p.size[1]), top[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kTokens; ++i) found[i].offer(block, top[i]);
    }

#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int64_t t = first + i * kThreads + threadIdx.x;
      if (t < tokens) p.index[t] = refine(p, x[i], z[i], found[i]);
    }
  }
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t pad_channels(int64_t channels) {
  return channels <= 4 ? 4 : channels <= 8 ? 8 : channels <= 16 ? 16 : channels;
}

}  // namespace

int64_t vq_nearest_cuda_workspace(int64_t channels, int64_t n_codes) {
  return round_up(n_codes, kTileCodes) * (pad_channels(channels) + 1) + channels + 1;
}

int vq_nearest_cuda(const float* z, const int64_t size[5], const int64_t stride[5], const float* codes, int64_t n_codes,
                    float* workspace, int64_t* index, void* stream) {
  Problem p;
  p.z = z;
  for (int i = 0; i < 5; ++i) {
    p.size[i] = size[i];
    p.stride[i] = stride[i];
  }
  p.codes = codes;
  p.n_codes = n_codes;
  p.padded_codes = round_up(n_codes, kTileCodes);
  p.padded_channels = pad_channels(size[1]);
  p.block_codes = round_up((n_codes + kMaxBlocks - 1) / kMaxBlocks, kTileCodes);
  p.centred = workspace;
  p.bias = p.centred + p.padded_codes * p.padded_channels;
  p.centre = p.bias + p.padded_codes;
  p.radius = p.centre + size[1];
  p.index = index;

  MEDDIFF_LAUNCH(centre_kernel, size[1], kThreads, stream, p);
  MEDDIFF_LAUNCH(shift_kernel, round_up(p.padded_codes, kThreads) / kThreads, kThreads, stream, p);
  MEDDIFF_LAUNCH(radius_kernel, 1, kThreads, stream, p);
  const int64_t tiles = round_up(p.tokens(), kThreads * kTokens) / (kThreads * kTokens);
  const int64_t grid = tiles < MEDDIFF_MAX_GRID ? tiles : MEDDIFF_MAX_GRID;
  if (p.padded_channels == 4) {
    MEDDIFF_LAUNCH(search_kernel<4>, grid, kThreads, stream, p);
  } else if (p.padded_channels == 8) {
    MEDDIFF_LAUNCH(search_kernel<8>, grid, kThreads, stream, p);
  } else if (p.padded_channels == 16) {
    MEDDIFF_LAUNCH(search_kernel<16>, grid, kThreads, stream, p);
  } else {
    MEDDIFF_LAUNCH(search_kernel<0>, grid, kThreads, stream, p);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace meddiff
