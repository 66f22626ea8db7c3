// Runs csrc/norm_silu_conv3d.cu, its wgmma variant and csrc/up_conv3d.cu on an emulated device. Argument: a file of
// int64 numbers
//   bytes of shared memory, type (0 float32, 1 bfloat16, 2 float16), wgmma, transposed, silu, upsample, six pads,
//   then 12 for each of x, weight, residual, residual_weight, out: bytes of its storage (0: there is none), bytes
//   before its first element, five sizes, five strides,
//   and bytes of bias, residual_bias, scale, shift and statistics,
// and the bytes of all of these in this order. Writes out's storage and the statistics to standard output, and the plan
// to standard error.
#include "emulate_cuda.h"

#include "../../csrc/norm_silu_conv3d.cu"
#include "../../csrc/norm_silu_conv3d_sm90a.cu"
#include "../../csrc/up_conv3d.cu"

#include <cstdio>
#include <cstdlib>

namespace {

std::FILE* file;

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, file) != static_cast<size_t>(count)) std::exit(3);
  return values;
}

// Ends where the storage ends, so that the address sanitizer sees what is beyond.
struct Storage {
  unsigned char* data = nullptr;
  int64_t bytes = 0;

  void load(int64_t count) {
    bytes = count;
    if (count == 0) return;
    data = new unsigned char[count];
    const std::vector<unsigned char> values = read<unsigned char>(count);
    std::memcpy(data, values.data(), count);
  }
  ~Storage() { delete[] data; }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !(file = std::fopen(argv[1], "rb"))) return 2;
  const std::vector<int64_t> head = read<int64_t>(12), tensors = read<int64_t>(5 * 12), others = read<int64_t>(5);
  emulated_largest_shared_memory = static_cast<int>(head[0]);
  meddiff::ConvProblem p{};
  p.type = static_cast<meddiff::ConvType>(head[1]);
  const bool wgmma = head[2];
  p.transposed = head[3], p.silu = head[4], p.upsample = head[5];
  for (int i = 0; i < 6; ++i) p.pads[i] = static_cast<int>(head[6 + i]);
  Storage storage[10];
  meddiff::ConvTensor* const views[5] = {&p.x, &p.weight, &p.residual, &p.residual_weight, &p.out};
  for (int i = 0; i < 10; ++i) storage[i].load(i < 5 ? tensors[12 * i] : others[i - 5]);
  for (int i = 0; i < 5; ++i) {
    const int64_t* numbers = tensors.data() + 12 * i;
    views[i]->data = numbers[0] ? storage[i].data + numbers[1] : nullptr;
    for (int axis = 0; axis < 5; ++axis) {
      views[i]->size[axis] = numbers[2 + axis];
      views[i]->stride[axis] = numbers[7 + axis];
    }
  }
  p.bias = storage[5].data;
  p.residual_bias = storage[6].data;
  p.scale = reinterpret_cast<float*>(storage[7].data);
  p.shift = reinterpret_cast<float*>(storage[8].data);
  p.statistics = reinterpret_cast<float*>(storage[9].data);
  for (int axis = 0; axis < 3; ++axis)
    if (p.output_size(axis) != p.out.size[2 + axis]) return 4;

  meddiff::ConvPlan plan{};
  const meddiff::ConvRoute route = wgmma ? meddiff::ConvRoute::wgmma : meddiff::plan_conv(p, plan);
  if (wgmma && !meddiff::plan_wgmma(p, plan)) return 7;
  std::fprintf(stderr, "%s slots=%d chunk=%d warps=%dx%d columns=%d segments=%d tiles=%dx%d\n",
               route == meddiff::ConvRoute::direct  ? "direct"
               : route == meddiff::ConvRoute::march ? "march"
               : wgmma                              ? "wgmma"
                                                    : "project",
               plan.slots, plan.chunk, plan.warps_m, plan.warps_n, plan.columns, static_cast<int>(plan.segments),
               static_cast<int>(plan.tiles_h), static_cast<int>(plan.tiles_w));
  const int64_t bytes = wgmma          ? meddiff::norm_silu_conv3d_wgmma_workspace(p)
                        : p.transposed ? meddiff::up_conv3d_cuda_workspace(p)
                                       : meddiff::norm_silu_conv3d_cuda_workspace(p);
  const std::unique_ptr<unsigned char[]> workspace(new unsigned char[bytes]);
  std::memset(workspace.get(), 0xff, bytes);
  const int error = wgmma          ? meddiff::norm_silu_conv3d_wgmma(p, workspace.get(), nullptr)
                    : p.transposed ? meddiff::up_conv3d_cuda(p, workspace.get(), nullptr)
                                   : meddiff::norm_silu_conv3d_cuda(p, workspace.get(), nullptr);
  if (error) return 5;
  for (int i : {4, 9})
    if (storage[i].bytes > 0 &&
        std::fwrite(storage[i].data, 1, storage[i].bytes, stdout) != static_cast<size_t>(storage[i].bytes))
      return 6;
  return 0;
}
