// Conv 3³ to one channel. tests/csrc compiles this file for the host.
#pragma once

#include "conv3d_tile.h"

namespace meddiff {
namespace {

// Products of every voxel of the window with the 27 taps on tensor cores, then sums of nine of them for each of three
// planes of out.
template <class T>
__global__ void __launch_bounds__(128) project_kernel(const __grid_constant__ ConvLaunch c) {
  constexpr int kRows = 3, kVoxels = 180;  // per warp, rows of 16 voxels; of the window
  const ConvPlan& plan = c.plan;
  const ConvProblem& p = c.problem;
  const Shared shared = device::shared_memory();
  const ConvTask task(plan, p.out.size[2]);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int windows = plan.weights_bytes, products = plan.shared_bytes - kVoxels * 33 * 4;
  const bool prologue = p.scale || p.silu;
  for (int i = threadIdx.x; i < plan.units() * 32; i += blockDim.x)
    device::cp_async16(shared, 16 * i, c.weights + i, true);

  float acc[1][kRows][2][2][4] = {};
  float sum[3] = {};  // of planes plane − 2, plane − 1 and plane
  int plane = static_cast<int>(task.plane), item = 0, buffer = 0;
  const int last = static_cast<int>(task.end) + 1;
  {
    const Window<T> window = window_of<T>(c, task, plane, 0, windows);
    window.copy(shared);
    device::cp_async_commit();
    device::cp_async_wait(0);
    if (prologue) window.activate(shared, p, 0, 1);
    device::block_barrier();
  }
  while (true) {
    const int next_item = item + 1 < plan.chunks() ? item + 1 : 0, next_plane = plane + (next_item == 0);
    const bool more = next_plane <= last;
    const Window<T> next =
        window_of<T>(c, task, next_plane, next_item, windows + (buffer ^ 1) * plan.window_bytes);
    if (more) next.copy(shared);
    device::cp_async_commit();

    const ConvStage stage(plan, item, 0);
#pragma unroll 1
    for (int k = 0; k < stage.steps; ++k) {
      uint32_t a[kRows][4];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const int voxel = smaller((warp * kRows + m) * 16 + lane % 16, kVoxels - 1);
        device::load_a(a[m], shared,
                       windows + buffer * plan.window_bytes + 16 * (voxel * plan.pitch + 2 * k + lane / 16));
      }
      Quad b[2];
      for (int g = 0; g < 2; ++g)
        b[g] = shared.at<Quad>((static_cast<int>(stage.first) + k * 2 + g) * 512 + lane * 16);
      device::mma_tile<T>(acc[0], a, b);
    }
    device::cp_async_wait(0);
    if (more && prologue) next.activate(shared, p, 0, 1);
    device::block_barrier();

    if (next_item == 0) {
#pragma unroll
      for (int m = 0; m < kRows; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int voxel = (warp * kRows + m) * 16 + lane / 4 + 8 * half;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& value = acc[0][m][i / 4][i / 2 % 2][2 * half + i % 2];
            if (voxel < kVoxels)
              shared.at<float>(products + 4 * (voxel * 33 + i / 4 * 16 + lane % 4 * 4 + i % 4)) = value;
            value = 0;
          }
        }
      device::block_barrier();
      const int row = threadIdx.x / 16, column = threadIdx.x % 16;
#pragma unroll
      for (int tap = 0; tap < 27; ++tap)
        sum[2 - tap / 9] +=
            shared.at<float>(products + 4 * (((row + tap / 3 % 3) * 18 + column + tap % 3) * 33 + tap));
      const int64_t o = static_cast<int64_t>(plane) - 2, h = task.row + row, w = task.w + column;
      if (o >= task.plane && h < p.out.size[3] && w < p.out.size[4])
        device::store(static_cast<T*>(const_cast<void*>(p.out.data)) + task.b * p.out.stride[0] +
                          o * p.out.stride[2] + h * p.out.stride[3] + w * p.out.stride[4],
                      sum[0] + c.bias[0]);
      sum[0] = sum[1], sum[1] = sum[2], sum[2] = 0;
    }
    if (!more) break;
    item = next_item;
    plane = next_plane;
    buffer ^= 1;
  }
}

}  // namespace
}  // namespace meddiff
