// How march_kernel and wgmma_kernel end: bias, residual and statistics of accumulators.
#pragma once

#include "conv3d_tile.h"

namespace meddiff {
namespace {

// Statistics of no voxel, for the warp; `moments` are the block's.
template <int G>
MEDDIFF_DEVICE void clear_moments(const Shared& shared, int moments) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  if (lane >= 4) return;
  for (int i = 0; i < G * 4; ++i)
    shared.at<device::Pair>(moments + warp * G * 128 + (i / 4 * 16 + lane * 4 + i % 4) * 8) = {0.0f, 0.0f};
}

// Writes one plane of the warp's tile, which is left in `acc` as it was rounded, and merges its statistics into those
// of the warp, float [groups·16, 2] at `moments`, of which lanes 0 to 3 alone touch their channels.
template <class T, int F, int M, int G>
MEDDIFF_DEVICE void finish(const ConvLaunch& c, const ConvTask& task, float (&acc)[M][G][2][4], int64_t plane,
                           int first_row, int first_channel, const Shared& shared, int moments, float& counted) {
  const ConvProblem& p = c.problem;
  const int lane = threadIdx.x & 31;
  const int height = static_cast<int>(p.out.size[3]) / F, width = static_cast<int>(p.out.size[4]) / F;
  T* out = static_cast<T*>(const_cast<void*>(p.out.data)) + task.b * p.out.stride[0] + plane * p.out.stride[2];
  const T* residual = nullptr;
  if (F == 1 && p.residual.data && !p.residual_weight.data)
    residual = static_cast<const T*>(p.residual.data) + task.b * p.residual.stride[0] + plane * p.residual.stride[2];
#pragma unroll
  for (int v = 0; v < 2 * M; ++v) {
    const int h = first_row + v / 2, w = task.w + lane / 4 + v % 2 * 8;
    if (h >= height || w >= width) continue;
    T* to = out + (h * F + task.row_parity) * p.out.stride[3] + (w * F + task.column_parity) * p.out.stride[4];
    const T* add = residual ? residual + h * p.residual.stride[3] + w * p.residual.stride[4] : nullptr;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const int channel = first_channel + g * 16 + lane % 4 * 4;
      if (channel >= p.outputs()) continue;
      float* value[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        value[i] = &acc[v / 2][g][i / 2][v % 2 * 2 + i % 2];
        *value[i] += c.bias[channel + i];
      }
      if (add) {
        const device::Two bits = *reinterpret_cast<const device::Two*>(add + channel);
        const device::Pair low = device::unpack(bits.x, T{}), high = device::unpack(bits.y, T{});
        *value[0] += low.low, *value[1] += low.high, *value[2] += high.low, *value[3] += high.high;
      }
      const device::Two bits = {device::pack({*value[0], *value[1]}, T{}), device::pack({*value[2], *value[3]}, T{})};
      *reinterpret_cast<device::Two*>(to + channel) = bits;
      const device::Pair low = device::unpack(bits.x, T{}), high = device::unpack(bits.y, T{});
      *value[0] = low.low, *value[1] = low.high, *value[2] = high.low, *value[3] = high.high;
    }
  }

  const int rows = smaller(height - first_row, M), columns = smaller(width - task.w, 16);
  if (!c.partial || rows <= 0) return;
  const float count = static_cast<float>(rows * columns);
#pragma unroll
  for (int g = 0; g < G; ++g) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float mean = 0, m2 = 0;
#pragma unroll
      for (int v = 0; v < 2 * M; ++v)
        if (v / 2 < rows && lane / 4 + v % 2 * 8 < columns) mean += acc[v / 2][g][i / 2][v % 2 * 2 + i % 2];
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) mean += device::shuffle_xor(mean, mask);
      mean /= count;
#pragma unroll
      for (int v = 0; v < 2 * M; ++v) {
        const float delta = acc[v / 2][g][i / 2][v % 2 * 2 + i % 2] - mean;
        if (v / 2 < rows && lane / 4 + v % 2 * 8 < columns) m2 = fmaf(delta, delta, m2);
      }
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) m2 += device::shuffle_xor(m2, mask);
      if (lane >= 4) continue;
      float* of_channel = &shared.at<float>(moments + (g * 16 + lane * 4 + i) * 8);
      float so_far = counted;
      merge(so_far, of_channel[0], of_channel[1], count, mean, m2);
    }
  }
  counted += count;
}

// Merges the statistics of the block's warps, at `moments`, into those of its task.
template <int G>
MEDDIFF_DEVICE void finish_task(const ConvLaunch& c, const ConvTask& task, const Shared& shared, int moments,
                                float counted) {
  if (!c.partial) return;
  const ConvPlan& plan = c.plan;
  const ConvProblem& p = c.problem;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int counts = moments + plan.warps() * G * 128;
  if (lane == 0) shared.at<float>(counts + 4 * warp) = counted;
  device::block_barrier();
  const int64_t to = task.b * plan.tasks() + task.index;
  for (int n = threadIdx.x; n < plan.block_groups() * 16; n += blockDim.x) {
    float count = 0, mean = 0, m2 = 0;
    for (int m = 0; m < plan.warps_m; ++m) {
      const int other = n / (G * 16) * plan.warps_m + m;
      const float* of_warp = &shared.at<float>(moments + (other * G * 16 + n % (G * 16)) * 8);
      merge(count, mean, m2, shared.at<float>(counts + 4 * other), of_warp[0], of_warp[1]);
    }
    const int64_t channel = static_cast<int64_t>(task.column) * plan.block_groups() * 16 + n;
    if (channel >= p.outputs()) continue;
    c.partial[to * 2 * p.outputs() + channel] = mean;
    c.partial[(to * 2 + 1) * p.outputs() + channel] = m2;
    if (channel == 0) c.counts[to] = count;
  }
}

}  // namespace
}  // namespace meddiff
