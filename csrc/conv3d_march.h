// The implicit GEMM behind norm_silu_conv3d and up_conv3d, sm_80 and newer; conv3d_plan.h says how the work is shared.
//
// march_kernel is an implicit GEMM: voxels x output channels, with channels x taps between them. The planes in flight
// are accumulators, not inputs: a plane of x is read, normalised and activated once, and every operand A that is loaded
// of it is multiplied by the weights of all `sets` planes of out that it adds to. Only the window of the present plane
// and of the next one are in shared memory. The next one comes by cp.async while the tensor cores work, and each thread
// applies x·scale + shift and SiLU in place to what it has itself copied, a part after each tap. The 1³ convolution of
// the residual is more channels for the plane of out that is about to be complete.
//
// Weights are packed as the lanes of a warp take them, so that a lane reads two operands B at once. Of 16 output
// channels the packing gives a lane four neighbours: whole 32-byte sectors are written.
//
// tests/csrc compiles this file for the host.
#pragma once

#include "conv3d_finish.h"

namespace meddiff {
namespace {

// Acc of the sets whose bit is in `active`; `at` is the place of the lane's operands A, `row_bytes` between two rows.
template <class T, bool All, int M, int G, int J>
MEDDIFF_DEVICE void multiply(float (&acc)[J][M][G][2][4], const Shared& shared, int at, int row_bytes, int weights,
                             int steps, int sets, int weight_bytes, int active) {
#pragma unroll 1
  for (int k = 0; k < steps; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) device::load_a(a[m], shared, at + m * row_bytes + 32 * k);
#pragma unroll
    for (int j = 0; j < J; ++j) {
      if (!All && !(active >> j & 1)) continue;
      Quad b[G];
#pragma unroll
      for (int g = 0; g < G; ++g) b[g] = shared.at<Quad>(weights + (k * sets + j) * weight_bytes + g * 512);
      device::mma_tile<T>(acc[j], a, b);
    }
  }
}

// T: Bf16 or Fp16. M, G: 16-voxel rows and groups of 16 channels per warp. J, F: sets, and how many a plane completes.
template <class T, int M, int G, int J, int F>
__global__ void __launch_bounds__(256, 1) march_kernel(const __grid_constant__ ConvLaunch c) {
  const ConvPlan& plan = c.plan;
  const ConvProblem& p = c.problem;
  const Shared shared = device::shared_memory();
  const ConvTask task(plan, p.out.size[2]);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int warp_m = warp % plan.warps_m, warp_n = warp / plan.warps_m;
  const int windows = plan.weights_bytes, moments = windows + 2 * plan.window_bytes;
  const int warp_moments = moments + warp * G * 128;
  const bool prologue = F == 1 && (p.scale || p.silu);

  const int items = plan.chunks() + plan.residual_chunks();
  int plane = static_cast<int>((task.plane + F - 1) / F);
  const int last = static_cast<int>((task.end - 1 + J - 1) / F);
  WeightStream stream{
      c.weights + ((task.column * plan.classes + task.row_parity * 2 + task.column_parity) * plan.units()) * 32,
      static_cast<int64_t>(last + 1 - plane) * (plan.chunks() * plan.taps + plan.residual_chunks()), 0, 0, 0};
  if (plan.slots == 0) {
    for (int i = threadIdx.x; i < plan.units() * 32; i += blockDim.x)
      device::cp_async16(shared, 16 * i, stream.weights + i, true);
  } else {
    for (int slot = 0; slot + 1 < plan.slots; ++slot) stream.next(plan, shared);
  }

  clear_moments<G>(shared, moments);
  float counted = 0;
  float acc[J][M][G][2][4] = {};

  {
    const Window<T> window = window_of<T>(c, task, plane, 0, windows);
    window.copy(shared);
    device::cp_async_commit();
    device::cp_async_wait(0);
    if (prologue) window.activate(shared, p, 0, 1);
    device::block_barrier();
  }
  int item = 0, buffer = 0, slot = 0;
  while (true) {
    const int next_item = item + 1 < items ? item + 1 : 0, next_plane = plane + (next_item == 0);
    const bool more = next_plane <= last;
    const Window<T> next =
        window_of<T>(c, task, next_plane, next_item, windows + (buffer ^ 1) * plan.window_bytes);
    const bool activated = more && prologue && next_item < plan.chunks();
    if (more) next.copy(shared);
    if (plan.slots == 0) device::cp_async_commit();  // else with the next stage of weights

    int active = 0;
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const int64_t o = static_cast<int64_t>(F) * plane - (J - 1) + j;
      active |= (o >= task.plane && o < task.end) << j;
    }
    const bool main = item < plan.chunks();
    const int taps = main ? plan.taps : 1, tap_columns = plan.window_columns - 15;
    for (int tap = 0; tap < taps; ++tap) {
      const ConvStage stage(plan, item, tap);
      int weights = static_cast<int>(stage.first) * 512;
      if (plan.slots > 0) {
        device::cp_async_wait(plan.slots - 2);
        device::block_barrier();
        stream.next(plan, shared);
        weights = slot * (plan.weights_bytes / plan.slots);
        if (++slot == plan.slots) slot = 0;
      }
      weights += warp_n * G * 512 + lane * 16;
      const int columns = main ? plan.window_columns : 16;
      const int row = warp_m * M + (main ? tap / tap_columns : 0), column = lane % 16 + (main ? tap % tap_columns : 0);
      const int at = windows + buffer * plan.window_bytes + 16 * ((row * columns + column) * plan.pitch + lane / 16);
      const int row_bytes = 16 * columns * plan.pitch;
      if (main && active == (1 << J) - 1) {
        multiply<T, true>(acc, shared, at, row_bytes, weights, stage.steps, J, plan.block_groups() * 512, active);
      } else {
        multiply<T, false>(acc, shared, at, row_bytes, weights, stage.steps, main ? J : 1,
                           plan.block_groups() * 512, main ? active : active & 1);
      }
      const int parts = taps > 2 ? taps - 2 : 1, part = tap - (taps - parts);
      if (activated && part >= 0) {
        if (part == 0 && (plan.slots == 0 || taps <= 2)) device::cp_async_wait(0);
        next.activate(shared, p, part, parts);
      }
    }
    device::cp_async_wait(0);
#ifndef MEDDIFF_OMIT_BARRIER  // tests: ThreadSanitizer must miss it
    device::block_barrier();
#endif

    if (next_item == 0) {
#pragma unroll
      for (int f = 0; f < F; ++f)
        if (active >> f & 1)
          finish<T, F>(c, task, acc[f], static_cast<int64_t>(F) * plane - (J - 1) + f, task.row + warp_m * M,
                    (task.column * plan.warps_n + warp_n) * G * 16, shared, warp_moments, counted);
#pragma unroll
      for (int j = 0; j < J; ++j)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int g = 0; g < G; ++g)
#pragma unroll
            for (int i = 0; i < 8; ++i)
              acc[j][m][g][i / 4][i % 4] = j + F < J ? acc[j + F < J ? j + F : 0][m][g][i / 4][i % 4] : 0.0f;
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
