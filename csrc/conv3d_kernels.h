// The CUDA kernels behind norm_silu_conv3d and up_conv3d, sm_80 and newer; see conv3d_plan.h for how the work is shared.
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
// tests/csrc compiles this file for the host. No GPU has run it yet.
#pragma once

#include "conv3d_plan.h"
#include "device.h"

namespace meddiff {
namespace {

using device::Quad;
using device::Shared;

// A tensor whose voxels are copied into windows.
struct ConvSource {
  const void* data;
  int64_t stride[4];  // B, D, H, W
  int channels, size[3];
  int first[3];  // padded plane, row and column of its first voxel
  int zoom;      // 1: doubled
};

struct ConvLaunch {
  ConvPlan plan;
  ConvProblem problem;
  ConvSource x, residual;
  const Quad* weights;   // [columns, classes, units, 32]
  const float* bias;     // [columns·block_groups·16], both biases
  float* partial;        // [B, tasks, 2, O] mean and M2 of each block, or null
  float* counts;         // [B, tasks]
};

MEDDIFF_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
MEDDIFF_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

MEDDIFF_DEVICE float silu(float z) {
  return z * device::reciprocal_approximate(1.0f + device::exp2_approximate(-1.4426950408889634f * z));
}

// Mean and sum of squared deviations, merged by Chan's formula.
template <class Real>
MEDDIFF_DEVICE void merge(Real& count, Real& mean, Real& m2, Real other_count, Real other_mean, Real other_m2) {
  if (other_count == 0) return;
  const Real total = count + other_count, delta = other_mean - mean, part = other_count / total;
  mean += delta * part;
  m2 += other_m2 + delta * delta * count * part;
  count = total;
}

// One plane of a chunk of channels, copied into a window by all threads. A thread keeps to one 16-byte unit of the
// channels and takes every step-th voxel of the window.
template <class T>
struct Window {
  const ConvSource& source;
  int offset, pitch;  // in shared memory
  int rows, columns;
  int b, plane, row, column;  // padded
  int channel, units;

  MEDDIFF_DEVICE int step() const { return static_cast<int>(blockDim.x) / units; }
  MEDDIFF_DEVICE int unit() const { return static_cast<int>(threadIdx.x) % units; }
  MEDDIFF_DEVICE int first() const { return static_cast<int>(threadIdx.x) / units; }
  MEDDIFF_DEVICE bool plane_inside() const {
    const int d = plane - source.first[0];
    return d >= 0 && d < source.size[0] << source.zoom && channel + 8 * unit() < source.channels;
  }
  MEDDIFF_DEVICE bool inside(int voxel) const {
    const int h = row + voxel / columns - source.first[1], w = column + voxel % columns - source.first[2];
    return h >= 0 && h < source.size[1] << source.zoom && w >= 0 && w < source.size[2] << source.zoom;
  }

  MEDDIFF_DEVICE void copy(const Shared& shared) const {
    if (first() >= step()) return;
    const bool in_plane = plane_inside();
    const T* base = static_cast<const T*>(source.data);
    if (in_plane)
      base += b * source.stride[0] + ((plane - source.first[0]) >> source.zoom) * source.stride[1] + channel +
              8 * unit();
    for (int voxel = first(); voxel < rows * columns; voxel += step()) {
      const bool copied = in_plane && inside(voxel);
      const T* from = base;
      if (copied)
        from += ((row + voxel / columns - source.first[1]) >> source.zoom) * source.stride[2] +
                ((column + voxel % columns - source.first[2]) >> source.zoom) * source.stride[3];
      device::cp_async16(shared, offset + 16 * (voxel * pitch + unit()), from, copied);
    }
  }

  // Norm and SiLU of part `part` of `parts` of what this thread has copied; zeros around the volume stay zeros.
  MEDDIFF_DEVICE void activate(const Shared& shared, const ConvProblem& p, int part, int parts) const {
    if (first() >= step() || !plane_inside()) return;
    float scale[8], shift[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t at = static_cast<int64_t>(b) * source.channels + channel + 8 * unit() + i;
      scale[i] = p.scale ? p.scale[at] : 1.0f;
      shift[i] = p.scale ? p.shift[at] : 0.0f;
    }
    const int rounds = (rows * columns + step() - 1) / step();
    const int end = smaller(rows * columns, first() + rounds * (part + 1) / parts * step());
#pragma unroll 1
    for (int voxel = first() + rounds * part / parts * step(); voxel < end; voxel += step()) {
      if (!inside(voxel)) continue;
      Quad& unit_bits = shared.at<Quad>(offset + 16 * (voxel * pitch + unit()));
      uint32_t bits[4] = {unit_bits.x, unit_bits.y, unit_bits.z, unit_bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        device::Pair pair = device::unpack(bits[i], T{});
        pair.low = fmaf(pair.low, scale[2 * i], shift[2 * i]);
        pair.high = fmaf(pair.high, scale[2 * i + 1], shift[2 * i + 1]);
        if (p.silu) pair = {silu(pair.low), silu(pair.high)};
        bits[i] = device::pack(pair, T{});
      }
      unit_bits = {bits[0], bits[1], bits[2], bits[3]};
    }
  }
};

// Where a block stands in the grid.
struct ConvTask {
  int column, row_parity, column_parity, b;
  int64_t index;  // of its statistics
  int row, w;     // first row and column of its tile, in voxels of its class
  int64_t plane, end;  // of out

  MEDDIFF_DEVICE ConvTask(const ConvPlan& plan, int64_t planes) {
    int64_t rest = blockIdx.x;
    column = static_cast<int>(rest % plan.columns);
    rest /= plan.columns;
    index = rest % plan.tasks();
    b = static_cast<int>(rest / plan.tasks());
    rest = index;
    row_parity = static_cast<int>(rest % plan.classes) / 2;
    column_parity = static_cast<int>(rest % plan.classes) % 2;
    rest /= plan.classes;
    w = static_cast<int>(rest % plan.tiles_w) * 16;
    rest /= plan.tiles_w;
    row = static_cast<int>(rest % plan.tiles_h) * plan.rows;
    plane = rest / plan.tiles_h * plan.planes;
    end = smaller(plane + plan.planes, planes);
  }
};

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

// Writes one plane of the warp's tile, which is left in `acc` as it was rounded, and merges its statistics into those of the warp, float [groups·16, 2] at
// `moments`, of which lanes 0 to 3 alone touch their channels.
template <class T, int M, int G>
MEDDIFF_DEVICE void finish(const ConvLaunch& c, const ConvTask& task, float (&acc)[M][G][2][4], int64_t plane,
                           int first_row, int first_channel, const Shared& shared, int moments, float& counted) {
  const ConvProblem& p = c.problem;
  const int lane = threadIdx.x & 31, zoom = c.plan.finished;
  const int height = static_cast<int>(p.out.size[3]) / zoom, width = static_cast<int>(p.out.size[4]) / zoom;
  T* out = static_cast<T*>(const_cast<void*>(p.out.data)) + task.b * p.out.stride[0] + plane * p.out.stride[2];
  const T* residual = nullptr;
  if (p.residual.data && !p.residual_weight.data)
    residual = static_cast<const T*>(p.residual.data) + task.b * p.residual.stride[0] + plane * p.residual.stride[2];
#pragma unroll
  for (int v = 0; v < 2 * M; ++v) {
    const int h = first_row + v / 2, w = task.w + lane / 4 + v % 2 * 8;
    if (h >= height || w >= width) continue;
    T* to = out + (h * zoom + task.row_parity) * p.out.stride[3] + (w * zoom + task.column_parity) * p.out.stride[4];
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

// The weights of stage (item, tap): where they start in the block's sequence, in units of 512 bytes, and how many.
struct ConvStage {
  int64_t first;
  int units, steps;

  MEDDIFF_DEVICE ConvStage(const ConvPlan& plan, int item, int tap) {
    const bool main = item < plan.chunks();
    const int chunk = main ? item : item - plan.chunks();
    const int per_step = plan.block_groups() * (main ? plan.sets : 1);
    steps = smaller(plan.chunk, (main ? plan.steps : plan.residual_steps) - chunk * plan.chunk);
    units = steps * per_step;
    first = static_cast<int64_t>(chunk) * plan.chunk * per_step;
    if (main) {
      first = first * plan.taps + tap * units;
    } else {
      first += static_cast<int64_t>(plan.steps) * plan.taps * plan.sets * plan.block_groups();
    }
  }
};

// Copies the weights of one stage after the other, plane by plane, into slots that take turns.
struct WeightStream {
  const Quad* weights;  // of the block
  int64_t left;         // stages
  int item, tap, slot;

  MEDDIFF_DEVICE void next(const ConvPlan& plan, const Shared& shared) {
    if (left > 0) {
      --left;
      const ConvStage stage(plan, item, tap);
      const int offset = slot * (plan.weights_bytes / plan.slots);
      for (int i = threadIdx.x; i < stage.units * 32; i += blockDim.x)
        device::cp_async16(shared, offset + 16 * i, weights + stage.first * 32 + i, true);
      if (++tap == (item < plan.chunks() ? plan.taps : 1)) {
        tap = 0;
        if (++item == plan.chunks() + plan.residual_chunks()) item = 0;
      }
      if (++slot == plan.slots) slot = 0;
    }
    device::cp_async_commit();
  }
};

// The window of item `item` (a chunk of x, then of the residual) for padded plane `plane`.
template <class T>
MEDDIFF_DEVICE Window<T> window_of(const ConvLaunch& c, const ConvTask& task, int plane, int item, int offset) {
  const ConvPlan& plan = c.plan;
  const bool main = item < plan.chunks();
  const int chunk = main ? item : item - plan.chunks();
  const int steps = smaller(plan.chunk, (main ? plan.steps : plan.residual_steps) - chunk * plan.chunk);
  const int channel = chunk * plan.chunk * 16;
  if (main)
    return {c.x, offset, plan.pitch, plan.window_rows, plan.window_columns, task.b, plane, task.row + task.row_parity,
            task.w + task.column_parity, channel, 2 * steps};
  return {c.residual, offset, plan.pitch, plan.rows, 16, task.b, plane - (plan.sets - 1), task.row, task.w, channel,
          2 * steps};
}

// T: Bf16 or Fp16. M, G: 16-voxel rows and groups of 16 channels per warp. J, F: sets, and how many a plane completes.
template <class T, int M, int G, int J, int F>
__global__ void __launch_bounds__(256, 1) march_kernel(ConvLaunch c) {
  const ConvPlan& plan = c.plan;
  const ConvProblem& p = c.problem;
  const Shared shared = device::shared_memory();
  const ConvTask task(plan, p.out.size[2]);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int warp_m = warp % plan.warps_m, warp_n = warp / plan.warps_m;
  const int windows = plan.weights_bytes, moments = windows + 2 * plan.window_bytes;
  const int warp_moments = moments + warp * G * 128;
  const bool prologue = p.scale || p.silu;

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

  if (lane < 4)
    for (int i = 0; i < G * 4; ++i)
      shared.at<device::Pair>(warp_moments + (i / 4 * 16 + lane * 4 + i % 4) * 8) = {0.0f, 0.0f};
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
      if (activated && tap >= 2) {
        if (tap == 2 && plan.slots == 0) device::cp_async_wait(0);
        next.activate(shared, p, tap - 2, taps - 2);
      }
    }
    device::cp_async_wait(0);
    if (activated && taps <= 2) next.activate(shared, p, 0, 1);
#ifndef MEDDIFF_OMIT_BARRIER  // tests: ThreadSanitizer must miss it
    device::block_barrier();
#endif

    if (next_item == 0) {
#pragma unroll
      for (int f = 0; f < F; ++f)
        if (active >> f & 1)
          finish<T>(c, task, acc[f], static_cast<int64_t>(F) * plane - (J - 1) + f, task.row + warp_m * M,
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

  if (!c.partial) return;
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

// Conv 3³ to one channel: products of every voxel of the window with the 27 taps on tensor cores, then sums of nine of
// them for each of three planes of out.
template <class T>
__global__ void __launch_bounds__(128) project_kernel(ConvLaunch c) {
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

// One thread per Quad of packed weights, and the biases behind them.
template <class T>
__global__ void pack_kernel(ConvLaunch c, Quad* weights, float* bias, bool project) {
  const ConvPlan& plan = c.plan;
  const ConvProblem& p = c.problem;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < plan.columns * plan.block_groups() * 16) {
    float value = 0;
    if (index < p.outputs() && p.bias) value += device::load(static_cast<const T*>(p.bias) + index);
    if (index < p.outputs() && p.residual_bias) value += device::load(static_cast<const T*>(p.residual_bias) + index);
    bias[index] = value;
  }
  const int lane = static_cast<int>(index % 32);
  const int64_t unit = index / 32 % plan.units();
  const int block = static_cast<int>(index / 32 / plan.units());  // column and class
  if (block >= plan.columns * plan.classes) return;
  const int column = block / plan.classes, row_parity = block % plan.classes / 2, column_parity = block % 2;
  const int group = static_cast<int>(unit % plan.block_groups());
  const int64_t row = unit / plan.block_groups(), main_rows = static_cast<int64_t>(plan.steps) * plan.taps * plan.sets;
  int step, tap = 0, set = 0;
  if (row < main_rows) {
    const int64_t chunk_rows = static_cast<int64_t>(plan.chunk) * plan.taps * plan.sets;
    const int chunk = static_cast<int>(row / chunk_rows);
    const int steps = smaller(plan.chunk, plan.steps - chunk * plan.chunk);
    const int rest = static_cast<int>(row - chunk * chunk_rows);
    tap = rest / (steps * plan.sets);
    step = chunk * plan.chunk + rest / plan.sets % steps;
    set = rest % plan.sets;
  } else {
    step = static_cast<int>(row - main_rows);
  }
  const ConvTensor& w = row < main_rows ? p.weight : p.residual_weight;
  const int side = plan.taps == 1 ? 1 : plan.taps == 4 ? 2 : 3;
  uint32_t bits[4];
  for (int i = 0; i < 4; ++i) {
    float pair[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t k = static_cast<int64_t>(step) * 16 + lane % 4 * 2 + half + i % 2 * 8;
      const int64_t n = (static_cast<int64_t>(column) * plan.block_groups() + group) * 16 + lane / 8 * 4 + i / 2 * 2 +
                        lane / 4 % 2;
      int64_t o = n, in = k, kd = 0, kh = 0, kw = 0;
      if (project) {
        o = n < 27 ? 0 : w.size[0];
        kd = n / 9, kh = n / 3 % 3, kw = n % 3;
      } else if (p.transposed) {
        o = k, in = n;
        kd = set, kh = 3 - row_parity - 2 * (tap / 2), kw = 3 - column_parity - 2 * (tap % 2);
      } else if (row < main_rows) {
        kd = plan.sets - 1 - set, kh = tap / side, kw = tap % side;
      }
      pair[half] = o < w.size[0] && in < w.size[1]
                       ? device::load(static_cast<const T*>(w.data) + o * w.stride[0] + in * w.stride[1] +
                                      kd * w.stride[2] + kh * w.stride[3] + kw * w.stride[4])
                       : 0.0f;
    }
    bits[i] = device::pack({pair[0], pair[1]}, T{});
  }
  weights[index] = {bits[0], bits[1], bits[2], bits[3]};
}

// One block per sample and 32 channels: eight strips of blocks, merged in float64, then those in order.
__global__ void merge_kernel(const float* partial, const float* counts, int64_t tasks, int64_t outputs,
                             float* statistics) {
  const Shared shared = device::shared_memory();
  const int64_t groups = (outputs + 31) / 32, b = blockIdx.x / groups;
  const int64_t channel = blockIdx.x % groups * 32 + threadIdx.x % 32;
  const int strip = threadIdx.x / 32;
  double count = 0, mean = 0, m2 = 0;
  if (channel < outputs)
    for (int64_t task = strip; task < tasks; task += 8) {
      const int64_t at = b * tasks + task;
      merge<double>(count, mean, m2, counts[at], partial[at * 2 * outputs + channel],
                    partial[(at * 2 + 1) * outputs + channel]);
    }
  double* mine = &shared.at<double>(static_cast<int>(threadIdx.x) * 24);
  mine[0] = count, mine[1] = mean, mine[2] = m2;
  device::block_barrier();
  if (strip > 0 || channel >= outputs) return;
  for (int other = 1; other < 8; ++other) {
    const double* theirs = mine + other * 32 * 3;
    merge(count, mean, m2, theirs[0], theirs[1], theirs[2]);
  }
  statistics[b * 2 * outputs + channel] = static_cast<float>(mean);
  statistics[(b * 2 + 1) * outputs + channel] = static_cast<float>(m2);
}

constexpr int kDirectThreads = 128;

struct DirectLaunch {
  ConvProblem problem;
  int64_t padded_outputs;  // a multiple of 8
  int64_t tasks;           // blocks of voxels per sample
  float* weights;          // [k, k, k, C, padded_outputs]
  float* residual_weights; // [R, padded_outputs], or null
  float* bias;             // [padded_outputs]
  float* partial;
  float* counts;
};

template <class T>
__global__ void direct_pack_kernel(DirectLaunch c) {
  const ConvProblem& p = c.problem;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kDirectThreads + threadIdx.x, n = c.padded_outputs;
  const int64_t o = index % n, row = index / n, k = p.kernel(), main_rows = k * k * k * p.channels();
  const bool inside = o < p.outputs();
  if (row < main_rows) {
    const int64_t in = row % p.channels(), tap = row / p.channels(), first = p.transposed ? in : o;
    c.weights[index] =
        inside ? device::load(static_cast<const T*>(p.weight.data) + first * p.weight.stride[0] +
                              (p.transposed ? o : in) * p.weight.stride[1] + tap / (k * k) * p.weight.stride[2] +
                              tap / k % k * p.weight.stride[3] + tap % k * p.weight.stride[4])
               : 0.0f;
  }
  if (p.residual_weight.data && row < p.residual.size[1])
    c.residual_weights[index] = inside ? device::load(static_cast<const T*>(p.residual_weight.data) +
                                                      o * p.residual_weight.stride[0] + row * p.residual_weight.stride[1])
                                       : 0.0f;
  if (row > 0) return;
  float bias = 0;
  if (inside && p.bias) bias += device::load(static_cast<const T*>(p.bias) + o);
  if (inside && p.residual_bias) bias += device::load(static_cast<const T*>(p.residual_bias) + o);
  c.bias[o] = bias;
}

// A block takes 128 voxels of one sample and 8 output channels.
template <class T>
__global__ void __launch_bounds__(kDirectThreads) direct_kernel(DirectLaunch c) {
  const ConvProblem& p = c.problem;
  const Shared shared = device::shared_memory();
  const int64_t groups = c.padded_outputs / 8, group = blockIdx.x % groups, task = blockIdx.x / groups;
  const int64_t b = task / c.tasks, voxels = p.out.size[2] * p.out.size[3] * p.out.size[4];
  const int64_t begin = task % c.tasks * kDirectThreads, voxel = begin + threadIdx.x;
  const int64_t o[3] = {voxel / (p.out.size[3] * p.out.size[4]), voxel / p.out.size[4] % p.out.size[3],
                        voxel % p.out.size[4]};
  const int kernel = p.kernel(), taps = p.transposed ? 2 : kernel, zoom = p.upsample ? 2 : 1;
  float acc[8] = {};
  for (int t = 0; voxel < voxels && t < taps * taps * taps; ++t) {
    const int tap[3] = {t / (taps * taps), t / taps % taps, t % taps};
    const T* from = static_cast<const T*>(p.x.data) + b * p.x.stride[0];
    int64_t at = 0;
    bool inside = true;
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t parity = o[axis] % 2;
      const int64_t padded = p.transposed ? o[axis] / 2 + parity + tap[axis] : o[axis] + tap[axis];
      const int64_t place = padded - p.pads[2 * axis] + p.skipped(2 * axis);
      inside = inside && place >= 0 && place < zoom * p.x.size[2 + axis];
      from += (inside ? place / zoom : 0) * p.x.stride[2 + axis];
      at = at * kernel + (p.transposed ? 3 - parity - 2 * tap[axis] : tap[axis]);
    }
    if (!inside) continue;
    const float* weights = c.weights + at * p.channels() * c.padded_outputs + group * 8;
    for (int64_t channel = 0; channel < p.channels(); ++channel, weights += c.padded_outputs) {
      float x = device::load(from + channel * p.x.stride[1]);
      if (p.scale) x = fmaf(x, p.scale[b * p.channels() + channel], p.shift[b * p.channels() + channel]);
      if (p.silu) x = silu(x);
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[i] = fmaf(x, weights[i], acc[i]);
    }
  }
  const auto residual = [&](int64_t channel) {
    return device::load(static_cast<const T*>(p.residual.data) + b * p.residual.stride[0] +
                        channel * p.residual.stride[1] + o[0] * p.residual.stride[2] + o[1] * p.residual.stride[3] +
                        o[2] * p.residual.stride[4]);
  };
  if (voxel < voxels && p.residual_weight.data) {
    const float* weights = c.residual_weights + group * 8;
    for (int64_t channel = 0; channel < p.residual.size[1]; ++channel, weights += c.padded_outputs) {
      const float x = residual(channel);
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[i] = fmaf(x, weights[i], acc[i]);
    }
  }
  for (int i = 0; voxel < voxels && i < 8 && group * 8 + i < p.outputs(); ++i) {
    const int64_t channel = group * 8 + i;
    acc[i] += c.bias[channel];
    if (p.residual.data && !p.residual_weight.data) acc[i] += residual(channel);
    T* to = static_cast<T*>(const_cast<void*>(p.out.data)) + b * p.out.stride[0] + channel * p.out.stride[1] +
            o[0] * p.out.stride[2] + o[1] * p.out.stride[3] + o[2] * p.out.stride[4];
    device::store(to, acc[i]);
    shared.at<float>((i * kDirectThreads + static_cast<int>(threadIdx.x)) * 4) = device::load(to);
  }
  if (!c.partial) return;
  device::block_barrier();
  const int64_t channel = group * 8 + threadIdx.x;
  if (threadIdx.x >= 8 || channel >= p.outputs()) return;
  const int count = static_cast<int>(smaller(voxels - begin, int64_t{kDirectThreads}));
  const float* values = &shared.at<float>(static_cast<int>(threadIdx.x) * kDirectThreads * 4);
  float mean = 0, m2 = 0;
  for (int i = 0; i < count; ++i) {
    const float delta = values[i] - mean;
    mean += delta / static_cast<float>(i + 1);
    m2 = fmaf(delta, values[i] - mean, m2);
  }
  c.partial[task * 2 * p.outputs() + channel] = mean;
  c.partial[(task * 2 + 1) * p.outputs() + channel] = m2;
  if (channel == 0) c.counts[task] = static_cast<float>(count);
}

// What a call needs of the workspace: offsets in bytes, and their end.
struct ConvWorkspace {
  int64_t weights, residual_weights, bias, partial, counts, end;
};

inline ConvWorkspace conv_workspace(const ConvProblem& p, ConvRoute route, const ConvPlan& plan) {
  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
  int64_t weights, residual = 0, outputs, tasks;
  if (route == ConvRoute::direct) {
    outputs = ceil_div(p.outputs(), 8) * 8;
    weights = static_cast<int64_t>(p.kernel()) * p.kernel() * p.kernel() * p.channels() * outputs * 4;
    residual = p.residual_weight.data ? p.residual.size[1] * outputs * 4 : 0;
    tasks = ceil_div(p.out.size[2] * p.out.size[3] * p.out.size[4], kDirectThreads);
  } else {
    outputs = static_cast<int64_t>(plan.columns) * plan.block_groups() * 16;
    weights = plan.columns * plan.classes * plan.units() * 512;
    tasks = plan.tasks();
  }
  ConvWorkspace w{};
  w.residual_weights = aligned(weights);
  w.bias = w.residual_weights + aligned(residual);
  w.partial = w.bias + aligned(outputs * 4);
  w.counts = w.end = w.partial;
  if (!p.statistics) return w;
  w.counts = w.partial + aligned(p.out.size[0] * tasks * 2 * p.outputs() * 4);
  w.end = w.counts + aligned(p.out.size[0] * tasks * 4);
  return w;
}

// The route, and its plan; a march that does not fit into shared memory goes the direct way.
inline ConvRoute plan_conv(const ConvProblem& p, ConvPlan& plan) {
  const ConvRoute route = conv_route(p);
  const int64_t limit = route == ConvRoute::direct ? 0 : device::largest_shared_memory();
  const bool fits = route == ConvRoute::march     ? make_conv_plan(p, limit, plan)
                    : route == ConvRoute::project ? make_project_plan(p, limit, plan)
                                                  : true;
  return fits ? route : ConvRoute::direct;
}

inline int merge_statistics(const ConvProblem& p, const float* partial, const float* counts, int64_t tasks,
                            void* stream) {
  if (!p.statistics) return 0;
  return device::launch(
      merge_kernel, p.out.size[0] * ceil_div(p.outputs(), 32), 256, 256 * 24, stream, partial, counts, tasks,
      p.outputs(), p.statistics);
}

template <class T>
int run_direct(const ConvProblem& p, unsigned char* workspace, void* stream) {
  const ConvWorkspace w = conv_workspace(p, ConvRoute::direct, {});
  DirectLaunch c{p, ceil_div(p.outputs(), 8) * 8,
                 ceil_div(p.out.size[2] * p.out.size[3] * p.out.size[4], kDirectThreads),
                 reinterpret_cast<float*>(workspace), reinterpret_cast<float*>(workspace + w.residual_weights),
                 reinterpret_cast<float*>(workspace + w.bias),
                 p.statistics ? reinterpret_cast<float*>(workspace + w.partial) : nullptr,
                 reinterpret_cast<float*>(workspace + w.counts)};
  const int64_t k = p.kernel();
  const int64_t rows = std::max(k * k * k * p.channels(), p.residual_weight.data ? p.residual.size[1] : 0);
  int error = device::launch(direct_pack_kernel<T>, ceil_div(rows * c.padded_outputs, kDirectThreads),
                                           kDirectThreads, 0, stream, c);
  if (error) return error;
  error = device::launch(direct_kernel<T>, p.out.size[0] * c.tasks * (c.padded_outputs / 8),
                                       kDirectThreads, 8 * kDirectThreads * 4, stream, c);
  return error ? error : merge_statistics(p, c.partial, c.counts, c.tasks, stream);
}

// `kernel` is the march or the project kernel that belongs to the plan.
template <class T>
int run_planned(const ConvProblem& p, ConvRoute route, const ConvPlan& plan, void (*kernel)(ConvLaunch),
                unsigned char* workspace, void* stream) {
  const ConvWorkspace w = conv_workspace(p, route, plan);
  const auto source = [&](const ConvTensor& t) {
    ConvSource s{t.data, {t.stride[0], t.stride[2], t.stride[3], t.stride[4]}, static_cast<int>(t.size[1]),
                 {static_cast<int>(t.size[2]), static_cast<int>(t.size[3]), static_cast<int>(t.size[4])}, {}, 0};
    return s;
  };
  auto* weights = reinterpret_cast<Quad*>(workspace);
  auto* bias = reinterpret_cast<float*>(workspace + w.bias);
  ConvLaunch c{plan, p, source(p.x), source(p.residual), weights, bias,
               p.statistics ? reinterpret_cast<float*>(workspace + w.partial) : nullptr,
               reinterpret_cast<float*>(workspace + w.counts)};
  c.x.zoom = p.upsample;
  for (int axis = 0; axis < 3; ++axis) c.x.first[axis] = p.pads[2 * axis] - p.skipped(2 * axis);
  const int64_t quads = std::max<int64_t>(plan.columns * plan.classes * plan.units() * 32,
                                          plan.columns * plan.block_groups() * 16);
  int error = device::launch(pack_kernel<T>, ceil_div(quads, 128), 128, 0, stream, c,
                                                              weights, bias, route == ConvRoute::project);
  if (error) return error;
  error = device::launch(kernel, p.out.size[0] * plan.tasks() * plan.columns, plan.warps() * 32,
                                     plan.shared_bytes, stream, c);
  return error ? error : merge_statistics(p, c.partial, c.counts, plan.tasks(), stream);
}

}  // namespace
}  // namespace meddiff
