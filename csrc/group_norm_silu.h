#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace meddiff {

// Tensors are streams of numbers whose channels repeat: C channels, voxel after voxel. The kernels take such a stream
// in `repeats` rows of `width` numbers, width being a multiple of C and of `step`, so that one table of `width` numbers
// says for each column what belongs to its channel, and no row has a rest.
struct GroupNormSiluFold {  // tables [width]; z = (x − centre)·gain + offset is what the activation takes
  const float* centre;
  const float* gain;
  const float* offset;
};

// T is float or, for bfloat16, uint16_t. x, dy, y, dx are [repeats, width], any alignment.
template <class T>
struct GroupNormSiluKernels {
  // mean and sum of squared deviations of each column: [width] each, written
  void (*moments)(const T* x, int64_t repeats, int64_t width, double* mean, double* m2);
  // y = silu(z), or z
  void (*forward)(const T* x, int64_t repeats, int64_t width, const GroupNormSiluFold& fold, bool silu, T* y);
  // Σ dz and Σ dz·(x − centre) of each column, dz = dy·silu′(z) or dy: [width] each, written
  void (*sums)(const T* x, const T* dy, int64_t repeats, int64_t width, const GroupNormSiluFold& fold, bool silu,
               double* of_dz, double* of_dz_x);
  // dx = dz·gain + (x − centre)·slope + level; slope, level [width]
  void (*backward)(const T* x, const T* dy, int64_t repeats, int64_t width, const GroupNormSiluFold& fold,
                   const float* slope, const float* level, bool silu, T* dx);
  // y = a + b, of `count` numbers; y may be a or b
  void (*add)(const T* a, const T* b, int64_t count, T* y);
  // x = GELU(x) by its tanh approximation, of `count` numbers
  void (*gelu)(T* x, int64_t count);
  // y = Σ weights·neighbours with (1, 2, 1)/4 along three axes, for `count` numbers; rows: those of the three planes of
  // three rows around y's, each beginning a voxel before it and of count + 2·channels numbers, as line [of as many]
  void (*blur)(const T* const* rows, int64_t count, int64_t channels, float* line, T* y);
};

struct GroupNormSiluIsa {
  const char* name;
  int64_t step;
  GroupNormSiluKernels<float> float32;
  GroupNormSiluKernels<uint16_t> bfloat16;
};

extern const GroupNormSiluIsa kGroupNormSiluPortable;
extern const GroupNormSiluIsa kGroupNormSiluAvx2;
extern const GroupNormSiluIsa kGroupNormSiluAvx512;

// the best one that this processor has, or the one of that name, or an error of the operator
const GroupNormSiluIsa& find_group_norm_silu_isa(const char* op, const std::optional<std::string>& name);

}  // namespace meddiff
