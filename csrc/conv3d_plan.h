// What the CUDA convolutions are asked for, and how a grid of blocks shares the work. Free of PyTorch and of CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define MEDDIFF_HOST_DEVICE __host__ __device__
#else
#define MEDDIFF_HOST_DEVICE
#endif

namespace meddiff {

enum class ConvType { float32, bfloat16, float16 };

struct ConvTensor {
  const void* data = nullptr;  // null: there is none
  int64_t size[5] = {};        // [B, C, D, H, W]; of weights [O, C, k, k, k], or [C, O, 4, 4, 4] if transposed
  int64_t stride[5] = {};      // in elements, any value
};

// One call of norm_silu_conv3d, or of up_conv3d if `transposed`. Every data pointer is to device memory.
struct ConvProblem {
  ConvType type;  // of all tensors but scale, shift and statistics
  bool transposed, silu, upsample;
  ConvTensor x, weight, residual, residual_weight, out;
  const void* bias;           // [O] or null
  const void* residual_bias;  // [O] or null
  const float* scale;         // [B, C] or null
  const float* shift;         // [B, C], null if scale is
  int pads[6];                // zero planes before and after D, H, W
  float* statistics;          // [B, 2, O] or null

  MEDDIFF_HOST_DEVICE int64_t channels() const { return x.size[1]; }
  MEDDIFF_HOST_DEVICE int64_t outputs() const { return out.size[1]; }
  MEDDIFF_HOST_DEVICE int kernel() const { return static_cast<int>(weight.size[2]); }

  // Planes of x, nearest x2 if `upsample`, that lie before the first one of the padded tile. A halo plane of x becomes
  // two when it is doubled, and one is enough.
  MEDDIFF_HOST_DEVICE int skipped(int side) const { return upsample && kernel() == 3 && pads[side] == 0; }
  int64_t padded(int axis) const {
    return (upsample ? 2 : 1) * x.size[2 + axis] + pads[2 * axis] + pads[2 * axis + 1] - skipped(2 * axis) -
           skipped(2 * axis + 1);
  }
  // Planes of out along an axis (0, 1, 2 for D, H, W).
  int64_t output_size(int axis) const {
    return transposed ? 2 * (padded(axis) - 2) : padded(axis) - (kernel() - 1);
  }
};

// direct        one thread per voxel and 8 channels, on the FMA units: any type, any strides, not tuned
// march         implicit GEMM on tensor cores for bfloat16 and float16, see conv3d_march.h
// wgmma         the same conv 3³ for compute capability 9.0, see conv3d_wgmma.h; of no call that does not ask for it
// project       conv 3³ to a single channel, on tensor cores: all 27 taps of a voxel are one product
enum class ConvRoute { direct, march, wgmma, project };

// Whether the tensor-core kernels can read and write this tensor: 16-byte (8-byte) pieces of channels-last voxels.
inline bool in_pieces(const ConvTensor& t, int64_t elements) {
  if (reinterpret_cast<uintptr_t>(t.data) % (2 * elements)) return false;
  for (int i : {0, 2, 3, 4})
    if (t.size[i] > 1 && t.stride[i] % elements) return false;
  return t.size[1] % 8 == 0 && t.stride[1] == 1;
}

// The one place that says which kernel serves a call on the GPU. Whether wgmma, or cuDNN with separate kernels around
// it, is faster for a shape is for benchmarks/bench_norm_silu_conv3d.py to say, on a GPU; until then all comes here.
inline ConvRoute conv_route(const ConvProblem& p) {
  if (p.type == ConvType::float32 || !in_pieces(p.x, 8)) return ConvRoute::direct;
  if (p.outputs() == 1 && p.kernel() == 3 && !p.residual.data && !p.statistics) return ConvRoute::project;
  if (!in_pieces(p.out, 4)) return ConvRoute::direct;
  if (p.residual.data && !in_pieces(p.residual, p.residual_weight.data ? 8 : 4)) return ConvRoute::direct;
  return ConvRoute::march;
}

// Whether the wgmma kernel can serve a call.
inline bool served_by_wgmma(const ConvProblem& p) {
  return conv_route(p) == ConvRoute::march && !p.transposed && p.kernel() == 3;
}

// Shape of a block of the march, wgmma and project kernels.
//
// A block takes a tile of 16 columns (W) and some rows (H), a group of output channels, and marches along D. Input
// channels come in chunks of 16·chunk. Plane p of the padded tile adds to `sets` planes of out at once, and completes
// `finished` of them: out plane finished·p − (sets − 1) + j is set j. sets = 3 and finished = 1 for 3³, 1 and 1 for 1³,
// 4 and 2 for the transposed 4³, whose blocks also split by the parity of H and of W: four classes of 2x2 taps.
struct ConvPlan {
  bool wgmma;
  int sets, finished, taps, classes;
  int tiles_m, groups;            // per warp: 16-voxel rows, and groups of 16 output channels
  int warps_m, warps_n;           // of a block
  int columns;                    // blocks that share a tile, by output channels
  int steps, residual_steps;      // ceil(C / 16) and ceil(R / 16)
  int chunk;                      // steps at a time
  int slots;                      // stages of weights in shared memory; 0: all of them, for good
  int rows, window_rows, window_columns;  // of the tile, of the input that it needs
  int pitch, unit_pitch;          // 16-byte units from a voxel to the next, and from 8 channels to the next
  int64_t planes;                 // of out, per block
  int64_t segments, tiles_h, tiles_w;
  int weights_bytes, window_bytes, shared_bytes;

  MEDDIFF_HOST_DEVICE int warps() const { return warps_m * warps_n; }
  MEDDIFF_HOST_DEVICE int block_groups() const { return groups * warps_n; }
  MEDDIFF_HOST_DEVICE int chunks() const { return (steps + chunk - 1) / chunk; }
  MEDDIFF_HOST_DEVICE int residual_chunks() const { return (residual_steps + chunk - 1) / chunk; }
  // Units of 512 bytes: one k16 x n16 operand, laid out as the lanes of a warp take it.
  MEDDIFF_HOST_DEVICE int64_t units() const {
    return (static_cast<int64_t>(steps) * taps * sets + residual_steps) * block_groups();
  }
  MEDDIFF_HOST_DEVICE int64_t tasks() const { return segments * tiles_h * tiles_w * classes; }  // per sample
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Divides the chunks and the shared memory; false if not even the smallest choice fits into `limit` bytes.
inline bool fit_conv_plan(ConvPlan& plan, int64_t limit) {
  const int64_t statistics = plan.warps() * (plan.groups * 16 * 2 + 1) * 4;
  const int preferred[4] = {plan.steps % 3 == 0 ? 3 : plan.steps % 4 == 0 ? 4 : 3, 3, 2, 1};
  for (int chunk : preferred) {
    plan.chunk = std::min(chunk, plan.steps);
    const int voxels = plan.window_rows * plan.window_columns;
    // the larger one odd: rows of ldmatrix, and the 8 channels that threads write for one voxel, lie in different banks
    plan.pitch = plan.wgmma ? 1 : 2 * plan.chunk + 1;
    plan.unit_pitch = plan.wgmma ? voxels | 1 : 1;
    plan.window_bytes = 16 * (plan.wgmma ? plan.unit_pitch * 2 * plan.chunk : plan.pitch * voxels);
    for (int slots : {0, plan.wgmma ? 4 : 3, plan.wgmma ? 3 : 2}) {
      const int64_t stage = static_cast<int64_t>(plan.chunk) * plan.sets * plan.block_groups() * 512;
      const int64_t weights = slots == 0 ? plan.units() * 512 : slots * stage;
      const int64_t bytes = weights + 2 * plan.window_bytes + statistics;
      if (bytes > limit) continue;
      plan.slots = slots;
      plan.weights_bytes = static_cast<int>(weights);
      plan.shared_bytes = static_cast<int>(bytes);
      return true;
    }
    if (plan.wgmma) break;  // its chunks are whole
  }
  return false;
}

// `limit`: bytes of shared memory that a block may have. Depends on shapes and on the limit alone.
inline bool make_conv_plan(const ConvProblem& p, int64_t limit, ConvPlan& plan, bool wgmma = false) {
  const int groups = static_cast<int>(ceil_div(p.outputs(), 16));
  plan = {};
  plan.wgmma = wgmma;
  plan.steps = static_cast<int>(ceil_div(p.channels(), 16));
  if (p.transposed) {
    plan.sets = 4, plan.finished = 2, plan.taps = 4, plan.classes = 4;
    plan.tiles_m = 4, plan.groups = 1;
    plan.warps_n = groups % 4 == 0 ? 4 : groups % 3 == 0 ? 3 : groups % 2 == 0 ? 2 : 1;
    plan.warps_m = plan.warps_n == 1 ? 4 : 2;
  } else {
    plan.sets = p.kernel(), plan.finished = 1, plan.taps = p.kernel() * p.kernel(), plan.classes = 1;
    plan.tiles_m = 2, plan.groups = groups % 3 == 0 ? 3 : 2;
    plan.warps_n = !wgmma && groups % (2 * plan.groups) == 0 ? 2 : 1;
    plan.warps_m = 8 / plan.warps_n;
    if (p.residual_weight.data) plan.residual_steps = static_cast<int>(ceil_div(p.residual.size[1], 16));
  }
  if (wgmma) {  // zero channels fill the last chunk
    const int chunk = plan.steps % 3 != 0 && plan.steps % 4 == 0 ? 4 : 3;
    plan.steps = static_cast<int>(ceil_div(plan.steps, chunk)) * chunk;
    plan.residual_steps = static_cast<int>(ceil_div(plan.residual_steps, chunk)) * chunk;
  }
  const int64_t height = p.out.size[3] / plan.finished, width = p.out.size[4] / plan.finished;
  const int fewest = wgmma ? 4 : 1;  // wgmma takes a warpgroup
  while (plan.warps_m > fewest && plan.warps_m / 2 * plan.tiles_m >= height) plan.warps_m /= 2;
  plan.columns = static_cast<int>(ceil_div(groups, plan.block_groups()));
  const int halo = p.transposed ? 1 : p.kernel() - 1;
  plan.rows = plan.warps_m * plan.tiles_m;
  plan.window_rows = plan.rows + halo;
  plan.window_columns = 16 + halo;
  plan.tiles_h = ceil_div(height, plan.rows);
  plan.tiles_w = ceil_div(width, 16);
  // long marches read fewer planes twice, short ones give every multiprocessor something to do
  plan.planes = 32;
  const auto blocks = [&] {
    return p.out.size[0] * ceil_div(p.out.size[2], plan.planes) * plan.tiles_h * plan.tiles_w * plan.classes *
           plan.columns;
  };
  while (plan.planes > 4 && blocks() < 512) plan.planes /= 2;
  plan.segments = ceil_div(p.out.size[2], plan.planes);
  return fit_conv_plan(plan, limit);
}

// The project kernel: four warps, 8 x 16 voxels, the 180 voxels of whose windows are 12 rows of 16. Its one "tap" has
// the 27 taps as output channels; their products go to `rows` of 33 floats.
inline bool make_project_plan(const ConvProblem& p, int64_t limit, ConvPlan& plan) {
  plan = {};
  plan.sets = plan.finished = plan.taps = plan.classes = plan.columns = 1;
  plan.tiles_m = 3, plan.groups = 2, plan.warps_m = 4, plan.warps_n = 1;
  plan.steps = static_cast<int>(ceil_div(p.channels(), 16));
  plan.rows = 8, plan.window_rows = 10, plan.window_columns = 18;
  plan.tiles_h = ceil_div(p.out.size[3], plan.rows);
  plan.tiles_w = ceil_div(p.out.size[4], 16);
  plan.planes = 32;
  while (plan.planes > 4 &&
         p.out.size[0] * ceil_div(p.out.size[2], plan.planes) * plan.tiles_h * plan.tiles_w < 1024)
    plan.planes /= 2;
  plan.segments = ceil_div(p.out.size[2], plan.planes);
  const int products = plan.window_rows * plan.window_columns * 33 * 4;
  if (!fit_conv_plan(plan, limit - products)) return false;
  plan.shared_bytes += products;
  return plan.slots == 0;
}

}  // namespace meddiff
