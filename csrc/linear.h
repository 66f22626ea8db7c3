#pragma once

#include <cstdint>

namespace meddiff {

// y [rows, outputs] = x [rows, inputs] · weightᵀ + bias in bfloat16. One of x and the weight [outputs, inputs] is read as
// it lies in memory, the other one is arranged as columns: for each two tiles of 16 of its rows, or the last one,
// [blocks of 32 inputs][tiles][512].
struct Linear {
  const uint16_t *x, *weight;
  const uint16_t* bias;  // or null
  uint16_t* y;
  int64_t rows, inputs, outputs;

  int64_t blocks() const { return (inputs + 31) / 32; }
};

constexpr int64_t kLinearRows = 64;  // of what is not arranged, at a time, and the fewest there may be

struct LinearIsa {
  void (*begin)();  // in each thread, before and behind its calls of the products
  void (*end)();
  // rows 16·tile … 16·tile + 15 of [count, inputs], in their place
  void (*arrange)(const uint16_t* rows, int64_t count, int64_t inputs, int64_t tile, uint16_t* to);
  // x is arranged: outputs first … first + kLinearRows, of which those from `written` on that there are are stored
  void (*of_few)(const Linear& work, int64_t first, int64_t written);
  // the weight is arranged: the same for rows of y
  void (*of_many)(const Linear& work, int64_t first, int64_t written);
};

extern const LinearIsa kLinearAmx;

}  // namespace meddiff
