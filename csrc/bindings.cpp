#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(meddiff, m) {
  // z [B, C, D, H, W] float32, codes [K, C] float32 -> [B, D, H, W] int64
  m.def("vq_nearest(Tensor z, Tensor codes) -> Tensor");
  // the same on the CPU with one of cpu_isas()
  m.def("_vq_nearest_isa(Tensor z, Tensor codes, str isa) -> Tensor");
  // instruction sets that were compiled in and that this processor has, the one in use first
  m.def("cpu_isas() -> str[]");
}
