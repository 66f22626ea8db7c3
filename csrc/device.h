// Every GPU instruction of the convolutions but wgmma (device_wgmma.h), each beside what it does when the same source
// is compiled for the host.
//
// Host twins run in tests/csrc/emulate_cuda.h, which must be included first: one host thread per CUDA thread. What is
// asynchronous on the GPU is as late as it may be there: cp_async16 leaves NaNs until cp_async_wait, so that a missing
// wait gives wrong numbers, and a missing barrier is a data race, which ThreadSanitizer reports.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MEDDIFF_DEVICE __device__ __forceinline__
#else
#include <cmath>
#define MEDDIFF_DEVICE inline
#endif

namespace meddiff::device {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
struct Pair {
  float low, high;
};
struct alignas(8) Two {  // four 16-bit numbers
  uint32_t x, y;
};
struct alignas(16) Quad {  // eight 16-bit numbers, or four float32
  uint32_t x, y, z, w;
};

// Dynamic shared memory of the block; places in it are byte offsets.
struct Shared {
  unsigned char* bytes;
  uint32_t address;  // of `bytes` in the shared window; 0 on the host

  template <class T>
  MEDDIFF_DEVICE T& at(int offset) const {
    return *reinterpret_cast<T*>(bytes + offset);
  }
};

MEDDIFF_DEVICE float bits_to_float(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

#ifdef __CUDACC__

__device__ __forceinline__ Shared shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic[];
  return {dynamic, static_cast<uint32_t>(__cvta_generic_to_shared(dynamic))};
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffff, value, mask);
}

// 2^x and 1/x to two units in the last place
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ Pair unpack(uint32_t bits, Bf16) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
__device__ __forceinline__ Pair unpack(uint32_t bits, Fp16) {
  Pair pair;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(pair.low), "=f"(pair.high)
      : "r"(bits));
  return pair;
}
__device__ __forceinline__ uint32_t pack(Pair pair, Bf16) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(pair.high), "f"(pair.low));
  return bits;
}
__device__ __forceinline__ uint32_t pack(Pair pair, Fp16) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(pair.high), "f"(pair.low));
  return bits;
}

// Copies 16 bytes from global to shared memory, or zeros; `from` must be a valid address either way.
__device__ __forceinline__ void cp_async16(const Shared& shared, int offset, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared.address + offset), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void store16(const Shared& shared, int offset, Quad value) {
  shared.at<Quad>(offset) = value;
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` (0 or 1) of this thread's groups are under way.
__device__ __forceinline__ void cp_async_wait(int pending) {
  if (pending == 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  }
}

// The four 8x8 matrices of an operand A [16 rows, 16 columns]: the lane's row, lane % 16, is at `offset`, plus 16 bytes
// for the upper half of the warp.
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Shared& shared, int offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared.address + offset)
               : "memory");
}

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Fp16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[m][g][half] += a[m]·b[g], of which b[g] holds two 16x8 operands: {x, y} and {z, w}.
template <class T, int M, int G>
__device__ __forceinline__ void mma_tile(float (&d)[M][G][2][4], const uint32_t (&a)[M][4], const Quad (&b)[G]) {
#pragma unroll
  for (int g = 0; g < G; ++g) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      mma(d[m][g][0], a[m], b[g].x, b[g].y, T{});
      mma(d[m][g][1], a[m], b[g].z, b[g].w, T{});
    }
  }
}

// Starts `kernel` on a stream (a cudaStream_t) of the current device; returns the cudaError_t as int.
template <class... Parameters>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void* stream,
           Parameters... arguments) {
  if (blocks > INT32_MAX) return static_cast<int>(cudaErrorInvalidConfiguration);
  if (shared_bytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

// Bytes of shared memory that one block may have on the current device.
inline int largest_shared_memory() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

#else

inline Shared shared_memory() { return {emulated_shared, 0}; }

inline void block_barrier() { __syncthreads(); }

inline float shuffle_xor(float value, int mask) { return emulated_exchange(value)[(threadIdx.x & 31) ^ mask]; }

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1.0f / x; }

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint32_t round_to(float value, Bf16) {  // to nearest, ties to even
  const uint32_t bits = float_to_bits(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t round_to(float value, Fp16) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (value != value) return 0x7fff;
  if (std::fabs(value) >= 65520.0f) return sign | 0x7c00;
  if (std::fabs(value) < 0x1p-14f) return sign | static_cast<uint32_t>(std::nearbyint(std::fabs(value) * 0x1p24f));
  return sign | (((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10));
}
inline float widen(uint32_t bits, Bf16) { return bits_to_float(bits << 16); }
inline float widen(uint32_t bits, Fp16) {
  const uint32_t sign = (bits & 0x8000) << 16, size = (bits & 0x7fff) << 13;
  if ((bits & 0x7c00) == 0x7c00) return bits_to_float(sign | 0x7f800000 | size);
  return std::copysign(bits_to_float(size) * 0x1p112f, bits_to_float(sign));
}

template <class T>
Pair unpack(uint32_t bits, T type) {
  return {widen(bits & 0xffff, type), widen(bits >> 16, type)};
}
template <class T>
uint32_t pack(Pair pair, T type) {
  return round_to(pair.low, type) | round_to(pair.high, type) << 16;
}

inline void cp_async16(const Shared& shared, int offset, const void* from, bool inside) {
  std::memset(shared.bytes + offset, 0xff, 16);
  emulated_copies.push_back({shared.bytes + offset, inside ? from : nullptr});
}
inline void store16(const Shared& shared, int offset, Quad value) {
  shared.at<Quad>(offset) = value;
  emulated_unfenced.push_back(shared.bytes + offset);
}
inline void cp_async_commit() { emulated_groups.push_back(emulated_copies.size()); }
inline void cp_async_wait(int pending) {
  if (static_cast<int>(emulated_groups.size()) <= pending) return;
  const size_t done = emulated_groups[emulated_groups.size() - 1 - pending];
  for (size_t i = 0; i < done; ++i) {
    if (emulated_copies[i].from) {
      std::memcpy(emulated_copies[i].to, emulated_copies[i].from, 16);
    } else {
      std::memset(emulated_copies[i].to, 0, 16);
    }
    emulated_unfenced.push_back(emulated_copies[i].to);
  }
  emulated_copies.erase(emulated_copies.begin(), emulated_copies.begin() + done);
  emulated_groups.erase(emulated_groups.begin(), emulated_groups.end() - pending);
  for (size_t& group : emulated_groups) group -= done;
}

inline void load_a(uint32_t (&a)[4], const Shared& shared, int offset) {
  const int lane = threadIdx.x & 31;
  const int* rows = emulated_exchange(offset);
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(&a[matrix], shared.bytes + rows[matrix * 8 + lane / 4] + lane % 4 * 4, 4);
}

template <class T, int M, int G>
void mma_tile(float (&d)[M][G][2][4], const uint32_t (&a)[M][4], const Quad (&b)[G]) {
  struct Operands {
    uint32_t a[M][4];
    uint32_t b[G][4];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const Operands* all = emulated_exchange(mine);
  const int lane = threadIdx.x & 31;
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < 4; ++i) {
      float row[16];  // of A
      for (int k = 0; k < 8; ++k) {
        const Pair pair = unpack(all[(lane / 4) * 4 + k % 4].a[m][i / 2 + k / 4 * 2], T{});
        row[2 * k] = pair.low;
        row[2 * k + 1] = pair.high;
      }
      for (int g = 0; g < G; ++g) {
        for (int half = 0; half < 2; ++half) {
          for (int k = 0; k < 8; ++k) {
            const Pair pair = unpack(all[(lane % 4 * 2 + i % 2) * 4 + k % 4].b[g][2 * half + k / 4], T{});
            d[m][g][half][i] += row[2 * k] * pair.low + row[2 * k + 1] * pair.high;
          }
        }
      }
    }
  }
}

template <class... Parameters>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void*,
           Parameters... arguments) {
  emulate(blocks, threads, [&] { kernel(arguments...); }, shared_bytes);
  return cudaSuccess;
}

inline int largest_shared_memory() { return emulated_largest_shared_memory; }

#endif

template <class T>
MEDDIFF_DEVICE float load(const T* from) {
  return unpack(from->bits, T{}).low;
}
MEDDIFF_DEVICE float load(const float* from) { return *from; }

template <class T>
MEDDIFF_DEVICE void store(T* to, float value) {
  to->bits = static_cast<uint16_t>(pack({value, 0.0f}, T{}));
}
MEDDIFF_DEVICE void store(float* to, float value) { *to = value; }

}  // namespace meddiff::device
