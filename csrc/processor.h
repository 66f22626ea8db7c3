#pragma once

namespace meddiff {

#if defined(__x86_64__)
// What csrc/*_<isa>.cpp are compiled for. They do not include this file, which must run on every processor.
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

}  // namespace meddiff
