// What the kernels on tensor cores share: windows of a tensor in shared memory, and the streams that fill them.
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
  int offset, pitch, unit_pitch;  // in shared memory
  int rows, columns;
  int b, plane, row, column;  // padded
  int channel, units;

  MEDDIFF_DEVICE int step() const { return static_cast<int>(blockDim.x) / units; }
  MEDDIFF_DEVICE int unit() const { return static_cast<int>(threadIdx.x) % units; }
  MEDDIFF_DEVICE int first() const { return static_cast<int>(threadIdx.x) / units; }
  MEDDIFF_DEVICE int place(int voxel) const { return offset + 16 * (voxel * pitch + unit() * unit_pitch); }
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
      device::cp_async16(shared, place(voxel), from, copied);
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
      const Quad unit_bits = shared.at<Quad>(place(voxel));
      uint32_t bits[4] = {unit_bits.x, unit_bits.y, unit_bits.z, unit_bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        device::Pair pair = device::unpack(bits[i], T{});
        pair.low = fmaf(pair.low, scale[2 * i], shift[2 * i]);
        pair.high = fmaf(pair.high, scale[2 * i + 1], shift[2 * i + 1]);
        if (p.silu) pair = {silu(pair.low), silu(pair.high)};
        bits[i] = device::pack(pair, T{});
      }
      device::store16(shared, place(voxel), {bits[0], bits[1], bits[2], bits[3]});
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
    return {c.x, offset, plan.pitch, plan.unit_pitch, plan.window_rows, plan.window_columns, task.b, plane,
            task.row + task.row_parity, task.w + task.column_parity, channel, 2 * steps};
  return {c.residual, offset, plan.pitch, plan.unit_pitch, plan.rows, 16, task.b, plane - (plan.sets - 1), task.row,
          task.w, channel, 2 * steps};
}

}  // namespace
}  // namespace meddiff
