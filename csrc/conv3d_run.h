// What surrounds the convolutions on the GPU: packed weights, the merge of statistics, workspace and launches.
#pragma once

#include "conv3d_direct.h"
#include "conv3d_march.h"
#include "conv3d_project.h"

namespace meddiff {
namespace {

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
      // wgmma: core matrices of 8 output x 8 input channels; of 16 output channels they take the same 8 as mma.sync
      const int in_group = plan.wgmma ? lane % 8 / 2 * 4 + lane / 16 * 2 + lane % 2
                                      : lane / 8 * 4 + i / 2 * 2 + lane / 4 % 2;
      const int in_step = plan.wgmma ? lane / 8 % 2 * 8 + i * 2 + half : lane % 4 * 2 + half + i % 2 * 8;
      const int64_t k = static_cast<int64_t>(step) * 16 + in_step;
      const int64_t n = (static_cast<int64_t>(column) * plan.block_groups() + group) * 16 + in_group;
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

// Whether the wgmma kernel can serve a call on the current device, if that is one of compute capability 9.0; its plan.
inline bool plan_wgmma(const ConvProblem& p, ConvPlan& plan) {
  return served_by_wgmma(p) && make_conv_plan(p, device::largest_shared_memory(), plan, true);
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

// `kernel` is the march, wgmma or project kernel that belongs to the plan.
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
