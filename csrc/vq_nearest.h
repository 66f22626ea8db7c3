// Nearest code by squared Euclidean distance. Free of PyTorch and of CUDA.
//
// Both devices search in two stages, and so give the same indices, bit for bit:
//   filter  z·c − |c|²/2 in float32 for every pair; only the largest value of each block of codes is kept;
//   exact   Σ (z − c)² in float64, channel by channel and without fused operations, for the codes of every block whose
//           largest value comes within the rounding error of the overall largest. The smallest distance wins, and among
//           equal ones the lowest index. A distance that is NaN never wins; index 0 if there is no other.
#pragma once

#include <cmath>
#include <cstdint>

namespace meddiff {

// Distance below the largest score at which a block still has to be evaluated exactly, as a function of
//   a: |x|, the norm of the token minus the centre, rounded to float32 per channel
//   r: the largest norm |y| of a code minus the centre, rounded likewise
// With u = 2⁻²⁴, γₙ = nu/(1 − nu), S = a·r + r²/2 ≥ Σ|xᵢyᵢ| + |y|²/2, a computed score differs from the exact one by at most
//   γ(C+1)·S   a chain of C products and C additions, fused or not, started from −|y|²/2
//   2u·S       x and y are rounded differences
//   u·S        −|y|²/2 is rounded to float32
// so two scores compare wrongly only if they are closer than twice that; another u·S pays for rounding the limit itself.
// The float64 distances are off by a factor 1 ± (C+3)·2⁻⁵³, which matters where a ≫ r. Underflow, also with denormals
// flushed to zero, adds at most 2⁻¹²⁶ per operation. Sums that might overflow give infinity and NaN stays NaN:
// "not below (largest − slack)" then holds for every block.
#ifdef __CUDACC__
__host__ __device__
#endif
static inline double vq_nearest_slack(double a, double r, int64_t channels) {
  const double n = static_cast<double>(channels + 8) * 0x1p-24;
  const double s = a * r + 0.5 * r * r;
  if (n >= 0.5 || s > 0x1p125) return HUGE_VAL;
  return 2.1 * n / (1 - n) * s + 1.1 * static_cast<double>(channels + 4) * 0x1p-53 * (a + r) * (a + r) +
         8.0 * static_cast<double>(channels + 1) * 0x1p-126 * (1 + a + r);
}

// One search on the CPU. Every pointer is borrowed.
struct VqNearestSearch {
  const float* z;        // [B, C, D, H, W]
  int64_t size[5];       // of z
  int64_t stride[5];     // of z, in elements, any value
  int64_t blocks;        // ceil(K / kVqBlock)
  const float* centre;   // [C], any point near the codes
  const float* rows;     // [blocks·kVqBlock, 1 + C]: −|y|²/2, then y = code − centre; padding rows −inf, 0, …
  const float* columns;  // [blocks, C, kVqBlock]: the codes themselves, padded with NaN
  double radius;         // largest |y|
  int64_t* index;        // [B·D·H·W], written
};

constexpr int kVqBlock = 32;

// Searches for tokens first … last − 1 (in B, D, H, W order). `scratch` holds tile·(2C + blocks) floats, 64-byte aligned.
using VqNearestKernel = void (*)(const VqNearestSearch&, int64_t first, int64_t last, float* scratch);

struct VqNearestIsa {
  const char* name;
  int tile;  // tokens searched together
  VqNearestKernel kernel;
};

extern const VqNearestIsa kVqNearestPortable;
extern const VqNearestIsa kVqNearestAvx2;
extern const VqNearestIsa kVqNearestAvx512;

// Number of floats that vq_nearest_cuda needs as workspace.
int64_t vq_nearest_cuda_workspace(int64_t channels, int64_t codes);

// Launches the search on `stream` (a cudaStream_t) of the current device and returns the cudaError_t as int. Every
// pointer but size and stride is to device memory.
//   z          [B, C, D, H, W] float32, sizes `size`, element strides `stride`, any strides
//   codes      [K, C] float32, contiguous
//   workspace  [vq_nearest_cuda_workspace(C, K)] float32, 16-byte aligned
//   index      [B, D, H, W] int64, contiguous, written
int vq_nearest_cuda(const float* z, const int64_t size[5], const int64_t stride[5], const float* codes, int64_t n_codes,
                    float* workspace, int64_t* index, void* stream);

}  // namespace meddiff
