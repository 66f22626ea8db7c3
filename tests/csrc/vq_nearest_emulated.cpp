// Runs csrc/vq_nearest.cu on an emulated device. Arguments: the five sizes and the five strides of z, its number of
// floats, K, and the file of z followed by codes (float32). Writes the int64 indices to standard output.
#include "emulate_cuda.h"

#include "../../csrc/vq_nearest.cu"

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc != 14) return 2;
  int64_t size[5], stride[5];
  for (int i = 0; i < 5; ++i) {
    size[i] = std::atoll(argv[1 + i]);
    stride[i] = std::atoll(argv[6 + i]);
  }
  const int64_t n_codes = std::atoll(argv[12]);
  std::vector<float> z(std::atoll(argv[11])), codes(n_codes * size[1]);
  std::FILE* file = std::fopen(argv[13], "rb");
  if (!file || std::fread(z.data(), sizeof(float), z.size(), file) != z.size() ||
      std::fread(codes.data(), sizeof(float), codes.size(), file) != codes.size())
    return 3;
  std::vector<float> workspace(meddiff::vq_nearest_cuda_workspace(size[1], n_codes), NAN);
  std::vector<int64_t> index(size[0] * size[2] * size[3] * size[4], -1);
  if (meddiff::vq_nearest_cuda(z.data(), size, stride, codes.data(), n_codes, workspace.data(), index.data(), nullptr))
    return 4;
  return std::fwrite(index.data(), sizeof(int64_t), index.size(), stdout) == index.size() ? 0 : 5;
}
