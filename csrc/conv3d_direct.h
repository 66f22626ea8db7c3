// The convolutions on FMA units, for every type, width and stride: correct, not tuned. tests/csrc compiles this file
// for the host.
#pragma once

#include "conv3d_tile.h"

namespace meddiff {
namespace {

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
    c.residual_weights[index] =
        inside ? device::load(static_cast<const T*>(p.residual_weight.data) + o * p.residual_weight.stride[0] +
                              row * p.residual_weight.stride[1])
               : 0.0f;
  if (row > 0) return;
  float bias = 0;
  if (inside && p.bias) bias += device::load(static_cast<const T*>(p.bias) + o);
  if (inside && p.residual_bias) bias += device::load(static_cast<const T*>(p.residual_bias) + o);
  c.bias[o] = bias;
}

// A block takes 128 voxels of one sample and 8 output channels.
template <class T>
__global__ void __launch_bounds__(kDirectThreads, 4) direct_kernel(DirectLaunch c) {
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
      if (p.scale || p.silu) {  // rounded, as tensor cores take it
        T rounded;
        device::store(&rounded, x);
        x = device::load(&rounded);
      }
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
    const float value = values[i] - values[0], delta = value - mean;  // small numbers: no digits are lost
    mean += delta / static_cast<float>(i + 1);
    m2 = fmaf(delta, value - mean, m2);
  }
  c.partial[task * 2 * p.outputs() + channel] = values[0] + mean;
  c.partial[(task * 2 + 1) * p.outputs() + channel] = m2;
  if (channel == 0) c.counts[task] = static_cast<float>(count);
}

}  // namespace
}  // namespace meddiff
