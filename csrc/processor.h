#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace meddiff {

#if defined(__x86_64__)
// What csrc/*_<isa>.cpp are compiled for. They do not include this file, which must run on every processor.
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// With products in bfloat16. Linux allows the use of tiles to a process that asks for it.
inline bool has_amx() {
#if defined(__linux__)
  static const bool has = [] {
    constexpr unsigned kAvx512Bf16 = 1u << 5, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr long kAskForFeature = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!has_avx512() || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
    return syscall(SYS_arch_prctl, kAskForFeature, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}
#endif

}  // namespace meddiff
