// wgmma and what it needs, beside what it does when the same source is compiled for the host; as device.h.
//
// Layouts are those of the PTX ISA ("Asynchronous Warpgroup Level Matrix Multiply-Accumulate", K-major, no swizzle).
// An operand in shared memory is made of core matrices, 8 rows (of A; columns of B) x 16 bytes along K, each 128
// contiguous bytes at any multiple of 16. The host twins are as late and as strict as the GPU may be: products are
// computed when they are waited for and are NaN until then, and they read a second copy of shared memory, which holds
// what a thread has written only after its fence_async_proxy.
#pragma once

#include "device.h"

#ifndef __CUDACC__
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#endif

namespace meddiff::device {

// Descriptor of an operand whose core matrices lie `k_bytes` apart along K and `row_bytes` along M or N.
MEDDIFF_DEVICE uint64_t matrix_descriptor(const Shared& shared, int offset, int k_bytes, int row_bytes) {
  return (shared.address + offset) >> 4 | static_cast<uint64_t>(k_bytes >> 4) << 16 |
         static_cast<uint64_t>(row_bytes >> 4) << 32;
}

#ifdef __CUDACC__

// Makes what this thread has written to shared memory visible to wgmma, once the threads have met at a barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Between the accumulators' last use and the next wgmma.
template <int M, int Size>
__device__ __forceinline__ void wgmma_fence(float (&d)[M][Size]) {
#pragma unroll
  for (int i = 0; i < M * Size; ++i) asm volatile("" : "+f"(d[i / Size][i % Size])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most one of this warpgroup's groups of products is under way.
__device__ __forceinline__ void wgmma_wait_but_one() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

// Waits for all of them; then `d` may be used.
template <int M, int Size>
__device__ __forceinline__ void wgmma_wait(float (&d)[M][Size]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < M * Size; ++i) asm volatile("" : "+f"(d[i / Size][i % Size])::"memory");
}

#define MEDDIFF_REGISTERS_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MEDDIFF_OPERANDS_16 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define MEDDIFF_REGISTERS_24 \
  MEDDIFF_REGISTERS_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MEDDIFF_OPERANDS_24 \
  MEDDIFF_OPERANDS_16, \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define MEDDIFF_REGISTERS_48 \
  MEDDIFF_REGISTERS_24 \
  ", %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39" \
  ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MEDDIFF_OPERANDS_48 \
  MEDDIFF_OPERANDS_24, \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define MEDDIFF_REGISTERS_72 \
  MEDDIFF_REGISTERS_48 \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
  ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MEDDIFF_OPERANDS_72 \
  MEDDIFF_OPERANDS_48, \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define MEDDIFF_WGMMA(n, type, registers, operands, a, b)                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, " a ", " b    \
               ", 1, 1, 1, 0, 0;"                                                                               \
               : operands                                                                                       \
               : "l"(a_operand), "l"(b_operand))
#define MEDDIFF_WGMMA_OF_WIDTH(type)                                                                  \
  if constexpr (N == 32) {                                                                            \
    MEDDIFF_WGMMA(32, type, MEDDIFF_REGISTERS_16, MEDDIFF_OPERANDS_16, "%16", "%17");                 \
  } else if constexpr (N == 48) {                                                                     \
    MEDDIFF_WGMMA(48, type, MEDDIFF_REGISTERS_24, MEDDIFF_OPERANDS_24, "%24", "%25");                 \
  } else if constexpr (N == 96) {                                                                     \
    MEDDIFF_WGMMA(96, type, MEDDIFF_REGISTERS_48, MEDDIFF_OPERANDS_48, "%48", "%49");                 \
  } else {                                                                                            \
    static_assert(N == 144);                                                                          \
    MEDDIFF_WGMMA(144, type, MEDDIFF_REGISTERS_72, MEDDIFF_OPERANDS_72, "%72", "%73");                \
  }

// d += a·b in the background, a [64, 16] and b [16, N] by their descriptors. In d the eight columns n hold four numbers
// d[4n …], which of warp w's rows 16w … 16w + 15 are row lane / 4, columns 8n + lane % 4 · 2 and the next, then the
// same of row lane / 4 + 8. d may have more than the N / 2 numbers that are used.
template <int N, int Size>
__device__ __forceinline__ void wgmma(float (&d)[Size], uint64_t a_operand, uint64_t b_operand, Bf16) {
  MEDDIFF_WGMMA_OF_WIDTH("bf16")
}
template <int N, int Size>
__device__ __forceinline__ void wgmma(float (&d)[Size], uint64_t a_operand, uint64_t b_operand, Fp16) {
  MEDDIFF_WGMMA_OF_WIDTH("f16")
}

#else

inline void fence_async_proxy() {
#ifndef MEDDIFF_OMIT_PROXY_FENCE  // tests: the products must be wrong
  for (const unsigned char* from : emulated_unfenced)
    std::memcpy(emulated_async_shared + (from - emulated_shared), from, 16);
#endif
  emulated_unfenced.clear();
}

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wgmma: %s\n", what);
  std::abort();
}

template <int M, int Size>
void wgmma_fence(float (&)[M][Size]) {
  emulated_fenced = true;
}
inline void wgmma_commit() {
  require(*emulated_exchange(emulated_operands) == emulated_operands, "the lanes of a warp differ in their operands");
  emulated_product_groups.push_back(emulated_products.size());
}

inline void wgmma_wait_for_all_but(size_t pending) {
  emulated_fenced = false;
  if (emulated_product_groups.size() <= pending) return;
  const size_t done = emulated_product_groups[emulated_product_groups.size() - 1 - pending];
  for (size_t i = 0; i < done; ++i)
    emulated_products[i].add(emulated_accumulators[emulated_products[i].d].data());
  emulated_products.erase(emulated_products.begin(), emulated_products.begin() + done);
  emulated_product_groups.erase(emulated_product_groups.begin(), emulated_product_groups.end() - pending);
  for (size_t& group : emulated_product_groups) group -= done;
  for (auto sum = emulated_accumulators.begin(); sum != emulated_accumulators.end();) {
    const auto uses = [&](const EmulatedProduct& product) { return product.d == sum->first; };
    if (std::any_of(emulated_products.begin(), emulated_products.end(), uses)) {
      ++sum;
    } else {
      std::copy(sum->second.begin(), sum->second.end(), sum->first);
      sum = emulated_accumulators.erase(sum);
    }
  }
}
inline void wgmma_wait_but_one() { wgmma_wait_for_all_but(1); }
template <int M, int Size>
void wgmma_wait(float (&)[M][Size]) {
  wgmma_wait_for_all_but(0);
}

template <class T>
float element_of(uint64_t operand, int row, int k, T type) {
  const uint64_t offset = (operand & 0x3fff) * 16 + row / 8 * (operand >> 32 & 0x3fff) * 16 +
                          k / 8 * (operand >> 16 & 0x3fff) * 16 + row % 8 * 16 + k % 8 * 2;
  uint16_t bits;
  std::memcpy(&bits, emulated_async_shared + offset, 2);
  return widen(bits, type);
}

template <int N, int Size, class T>
void wgmma(float (&d)[Size], uint64_t a_operand, uint64_t b_operand, T type) {
  static_assert(N % 8 == 0 && N <= 256 && N / 2 <= Size);
  emulated_operands = emulated_operands * 31 * 31 + a_operand * 31 + b_operand;
  require(((a_operand | b_operand) & 0xffffc000c000c000u) == 0, "not a descriptor without swizzle");
  require(emulated_fenced, "no wgmma_fence since the last wait");
  std::vector<float>& sum = emulated_accumulators[d];
  if (sum.empty()) {
    sum.assign(d, d + N / 2);
    std::fill_n(d, N / 2, NAN);
  }
  require(sum.size() == N / 2, "products of different widths under way for the same accumulators");
  const auto add = [=](float* sum) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
    float a[2][16], b[16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) a[half][k] = element_of(a_operand, warp * 16 + lane / 4 + half * 8, k, type);
    for (int n = 0; n < N / 4; ++n) {
      for (int k = 0; k < 16; ++k) b[k] = element_of(b_operand, n / 2 * 8 + lane % 4 * 2 + n % 2, k, type);
      for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 16; ++k) sum[n / 2 * 4 + half * 2 + n % 2] += a[half][k] * b[k];
    }
  };
  emulated_products.push_back({d, add});
}

#endif

}  // namespace meddiff::device
