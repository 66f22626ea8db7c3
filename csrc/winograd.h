#pragma once

#include <cstdint>

namespace meddiff {

// A convolution 3³ without padding by Winograd's minimal filtering F(2³, 3³): blocks of 2³ outputs of 4³ inputs each.
// x [D + 2, H + 2, W + 2, C] and y [D, H, W, O] have no gaps. u: the weight's 64 points, [64, C, O]; bias [O] or null.
struct WinogradTile {
  const float* x;
  const float* u;
  const float* bias;
  float* y;
  int64_t depth, height, width, channels, outputs;  // D, H, W, C, O

  int64_t across(int64_t n) const { return (n + 1) / 2; }
  int64_t blocks() const { return across(depth) * across(height) * across(width); }
};

struct WinogradIsa {
  const char* name;
  int64_t lanes;  // C and O are multiples of it
  // taps [27, numbers] → u [64, numbers], for `numbers` a multiple of lanes
  void (*transform_weight)(const float* taps, int64_t numbers, float* u);
  // blocks first … first + count, in the order of D, H and W; memory: 64·count·(C + O) floats
  void (*convolve)(const WinogradTile& tile, int64_t first, int64_t count, float* memory);
};

extern const WinogradIsa kWinogradPortable;
extern const WinogradIsa kWinogradAvx2;
extern const WinogradIsa kWinogradAvx512;

}  // namespace meddiff
