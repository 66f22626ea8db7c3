// The 3³ convolution of norm_silu_conv3d by wgmma, for compute capability 9.0 (sm_90a).
//
// The march is that of conv3d_march.h, with the same tasks, streams and end. Windows are channel-blocked by 8,
// [channels / 8][rows][columns][8], so that 8 voxels of a row are one core matrix of operand A, 8 rows of them are its
// 64 voxels, and a tap of the stencil is a shift of its address: no im2col. Each product has the weights of all three
// planes of out that a plane of x adds to as its columns, N = 96 or 144; at that width it takes the tensor cores longer
// to compute than shared memory to deliver the operands. A block is one or two warpgroups, 8 rows x 16 columns each.
//
// Products of one tap run while the threads normalise and activate a part of the next window. Those of planes of out
// that are not the block's (two at each end of the march) are computed and dropped.
//
// tests/csrc compiles this file for the host.
#pragma once

#include "conv3d_finish.h"
#include "device_wgmma.h"

namespace meddiff {
namespace {

// Starts the products of one tap: acc += the 8 x 16 voxels at `at` times weights of N columns, of Steps·16 channels.
// Everything is unrolled, and no branch lies between fence and commit, because ptxas gives up and serialises otherwise.
template <class T, int Steps, int N, int Halves, int Size>
MEDDIFF_DEVICE void multiply_tap(float (&acc)[Halves][Size], const Shared& shared, int at, int unit_bytes,
                                 int row_bytes, int weights) {
  device::wgmma_fence(acc);
#pragma unroll
  for (int k = 0; k < Steps; ++k) {
    const uint64_t b = device::matrix_descriptor(shared, weights + k * N * 32, 128, 256);
#pragma unroll
    for (int half = 0; half < Halves; ++half) {
      const uint64_t a = device::matrix_descriptor(shared, at + 2 * k * unit_bytes + 128 * half, unit_bytes, row_bytes);
      device::wgmma<N>(acc[half], a, b, T{});
    }
  }
  device::wgmma_commit();
}

// T: Bf16 or Fp16. Steps: 16 channels each, of a window. G: groups of 16 output channels.
template <class T, int Steps, int G>
__global__ void __launch_bounds__(256, 1) wgmma_kernel(const __grid_constant__ ConvLaunch c) {
  constexpr int kSets = 3, kHalves = 2;  // planes of out per plane of x, 8-column halves of the tile
  const ConvPlan& plan = c.plan;
  const ConvProblem& p = c.problem;
  const Shared shared = device::shared_memory();
  const ConvTask task(plan, p.out.size[2]);
  const int warp = threadIdx.x / 32, warpgroup = threadIdx.x / 128;
  const int windows = plan.weights_bytes, moments = windows + 2 * plan.window_bytes;
  const bool prologue = p.scale || p.silu;

  const int items = plan.chunks() + plan.residual_chunks();
  int plane = static_cast<int>(task.plane);
  const int last = static_cast<int>(task.end) + kSets - 2;
  WeightStream stream{
      c.weights + task.column * plan.units() * 32,
      static_cast<int64_t>(last + 1 - plane) * (plan.chunks() * plan.taps + plan.residual_chunks()), 0, 0, 0};
  if (plan.slots == 0) {
    for (int i = threadIdx.x; i < plan.units() * 32; i += blockDim.x)
      device::cp_async16(shared, 16 * i, stream.weights + i, true);
  } else {
    for (int slot = 0; slot + 2 < plan.slots; ++slot) stream.next(plan, shared);
  }

  clear_moments<G>(shared, moments);
  float counted = 0;
  float acc[kHalves][kSets * G * 8] = {};

  {
    const Window<T> window = window_of<T>(c, task, plane, 0, windows);
    window.copy(shared);
    device::cp_async_commit();
    device::cp_async_wait(0);
    if (prologue) window.activate(shared, p, 0, 1);
    device::fence_async_proxy();
    device::block_barrier();
  }
  int item = 0, buffer = 0, slot = 0;
  while (true) {
    const int next_item = item + 1 < items ? item + 1 : 0, next_plane = plane + (next_item == 0);
    const bool more = next_plane <= last;
    const Window<T> next = window_of<T>(c, task, next_plane, next_item, windows + (buffer ^ 1) * plan.window_bytes);
    const bool activated = more && prologue && next_item < plan.chunks();
    if (more) next.copy(shared);
    if (plan.slots == 0) device::cp_async_commit();  // else with the next stage of weights

    const bool main = item < plan.chunks();
    const int taps = main ? plan.taps : 1, columns = main ? plan.window_columns : 16;
    for (int tap = 0; tap < taps; ++tap) {
      const ConvStage stage(plan, item, tap);
      int weights = static_cast<int>(stage.first) * 512;
      if (plan.slots > 0) {
        // of the slots one is being filled, one is read by products under way, and the one after that is filled now
        device::cp_async_wait(plan.slots - 3);
        device::fence_async_proxy();
        device::block_barrier();
        stream.next(plan, shared);
        weights = slot * (plan.weights_bytes / plan.slots);
        if (++slot == plan.slots) slot = 0;
      }
      const int voxel = (warpgroup * 8 + tap / 3) * columns + tap % 3;
      const int at = windows + buffer * plan.window_bytes + 16 * voxel;
      if (main) {
        multiply_tap<T, Steps, kSets * G * 16>(acc, shared, at, 16 * plan.unit_pitch, 16 * columns, weights);
      } else {
        multiply_tap<T, Steps, G * 16>(acc, shared, at, 16 * plan.unit_pitch, 16 * columns, weights);
      }
      const int parts = taps > 2 ? taps - 2 : 1, part = tap - (taps - parts);
      if (activated && part >= 0) {
        if (part == 0 && (plan.slots == 0 || taps <= 2)) device::cp_async_wait(0);
        next.activate(shared, p, part, parts);
      }
      device::wgmma_wait_but_one();
    }
    device::cp_async_wait(0);
    device::fence_async_proxy();
    device::wgmma_wait(acc);
#ifndef MEDDIFF_OMIT_BARRIER  // tests: ThreadSanitizer must miss it
    device::block_barrier();
#endif

    if (next_item == 0) {
      if (plane >= task.plane + kSets - 1) {
        float done[2][G][2][4];  // as mma.sync leaves two rows of 16 voxels
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
          for (int i = 0; i < 16; ++i)
            done[i / 2 % 2][g][i / 8][i / 4 % 2 * 2 + i % 2] = acc[i / 4 % 2][g * 8 + i / 8 * 4 + i % 4];
        finish<T, 1>(c, task, done, plane - (kSets - 1), task.row + warp * 2, task.column * G * 16, shared,
                     moments + warp * G * 128, counted);
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
#pragma unroll
        for (int i = 0; i < kSets * G * 8; ++i)
          acc[half][i] = i + G * 8 < kSets * G * 8 ? acc[half][i + G * 8] : 0.0f;
    }
    if (!more) break;
    item = next_item;
    plane = next_plane;
    buffer ^= 1;
  }
  finish_task<G>(c, task, shared, moments, counted);
}

}  // namespace
}  // namespace meddiff
