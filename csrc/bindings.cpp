#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(meddiff, m) {
  // z [B, C, D, H, W] float32, codes [K, C] float32 -> [B, D, H, W] int64
  m.def("vq_nearest(Tensor z, Tensor codes) -> Tensor");
  // the same on the CPU with one of cpu_isas()
  m.def("_vq_nearest_isa(Tensor z, Tensor codes, str isa) -> Tensor");
  // features [n, C, q, q, q], weight [C, C], bias [C], codes [K, C] -> latent [B, C, d, h, w], index [B, d, h, w],
  // code rows [B, d, h, w, C] and, for each code, sum of its tokens and their number [K, C + 1]; float32 but features
  // and index. Rows and statistics that are not wanted are empty, and all but the latent without codes.
  m.def(
      "_vq_encode(Tensor features, Tensor weight, Tensor bias, Tensor codes, SymInt d, SymInt h, SymInt w, bool rows, "
      "bool statistics) -> (Tensor, Tensor, Tensor, Tensor)");
  // latent [B, C, D, H, W] float32, un-scaled if there are extremes, codes [K, C] float32, table [K, M] of any type
  // -> index [B, D, H, W] and table rows [B, D, H, W, M]
  m.def("_vq_decode(Tensor latent, float? minimum, float? maximum, Tensor codes, Tensor table) -> (Tensor, Tensor)");
  // qkv [B, D, H, W, 3·C] -> [B, D, H, W, C], and the same with the log-sum-exp, float32 [B, heads, D, H, W]
  m.def("window_attention(Tensor qkv, int heads, int window) -> Tensor");
  m.def("_window_attention(Tensor qkv, int heads, int window) -> (Tensor, Tensor)");
  m.def("_window_attention_isa(Tensor qkv, int heads, int window, str isa) -> (Tensor, Tensor)");
  // grad, out [B, D, H, W, C], lse as returned -> the gradient of qkv
  m.def(
      "_window_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int heads, int window) -> Tensor");
  m.def(
      "_window_attention_backward_isa(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int heads, int window, str isa)"
      " -> Tensor");
  // x, h [B, N, C], gate, shift, scale [B, C] -> x + gate·h, its or x's LayerNorm modulated, and mean and 1/σ, float32
  // [2, B, N]; what is not asked for, by gate and h or by shift and scale, is empty
  m.def("_adaln(Tensor x, Tensor? gate, Tensor? h, Tensor? shift, Tensor? scale, float eps)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("_adaln_isa(Tensor x, Tensor? gate, Tensor? h, Tensor? shift, Tensor? scale, float eps, str isa)"
        " -> (Tensor, Tensor, Tensor)");
  // x [B, C, D, H, W] channels-last -> the same; then x as [B, voxels, C] -> y and stats [3, B, groups], and
  // dy, x, stats -> dx and the sums [2, B, C] of which all other gradients are made
  m.def(
      "group_norm_silu(Tensor x, int groups, Tensor weight, Tensor bias, float eps, Tensor? scale=None, "
      "Tensor? shift=None, bool silu=True) -> Tensor");
  m.def(
      "_group_norm_silu(Tensor x, int groups, Tensor weight, Tensor bias, float eps, Tensor? scale, Tensor? shift, "
      "bool silu) -> (Tensor, Tensor)");
  m.def(
      "_group_norm_silu_backward(Tensor dy, Tensor x, Tensor stats, int groups, Tensor weight, Tensor bias, "
      "Tensor? scale, Tensor? shift, bool silu) -> (Tensor, Tensor)");
  m.def(
      "_group_norm_silu_isa(Tensor x, int groups, Tensor weight, Tensor bias, float eps, Tensor? scale, "
      "Tensor? shift, bool silu, str isa) -> (Tensor, Tensor)");
  m.def(
      "_group_norm_silu_backward_isa(Tensor dy, Tensor x, Tensor stats, int groups, Tensor weight, Tensor bias, "
      "Tensor? scale, Tensor? shift, bool silu, str isa) -> (Tensor, Tensor)");
  // of a tile x [B, C, d, h, w], conv 3³ or 1³ of silu(x·scale + shift) with zeros around it, plus bias and residual,
  // into out [B, O, D, H, W], and mean and sum of squared deviations of what was written, [B, 2, O]
  m.def(
      "norm_silu_conv3d(Tensor x, Tensor? scale, Tensor? shift, bool silu, bool upsample, Tensor weight, Tensor? bias, "
      "int[] pads, Tensor? residual, Tensor? residual_weight, Tensor? residual_bias, Tensor(a!) out, "
      "Tensor(b!)? statistics) -> ()");
  // the same by the kernel for compute capability 9.0, on GPUs of that alone
  m.def(
      "_norm_silu_conv3d_wgmma(Tensor x, Tensor? scale, Tensor? shift, bool silu, bool upsample, Tensor weight, "
      "Tensor? bias, int[] pads, Tensor? residual, Tensor? residual_weight, Tensor? residual_bias, Tensor(a!) out, "
      "Tensor(b!)? statistics) -> ()");
  // the same for a transposed conv 4³ of stride 2, x [B, C, d, h, w] with its halo, weight [C, O, 4, 4, 4]
  m.def(
      "up_conv3d(Tensor x, Tensor weight, Tensor? bias, int[] pads, Tensor(a!) out, Tensor(b!)? statistics) -> ()");
  // what stands before and behind a convolution on the CPU: out [B, C, D, H, W] is silu(x·scale + shift), doubled from
  // its skip-th voxel on, with zeros around it; out = y + residual and its statistics, y being used up
  m.def(
      "_conv_input(Tensor x, Tensor? scale, Tensor? shift, bool silu, bool upsample, int[] skip, int[] pads, "
      "Tensor(a!) out, str? isa=None) -> ()");
  m.def(
      "_conv_output(Tensor(a!) y, Tensor? residual, Tensor(b!) out, Tensor(c!)? statistics, str? isa=None) -> ()");
  // norm_silu_conv3d and up_conv3d on the CPU in bfloat16, all in one
  m.def(
      "_direct_conv3d(Tensor x, Tensor? scale, Tensor? shift, bool silu, Tensor weight, Tensor? bias, int[] pads, "
      "Tensor? residual, Tensor? residual_weight, Tensor? residual_bias, Tensor(a!) out, Tensor(b!)? statistics, "
      "str? isa=None) -> ()");
  m.def(
      "_direct_up_conv3d(Tensor x, Tensor weight, Tensor? bias, int[] pads, Tensor(a!) out, Tensor(b!)? statistics, "
      "str? isa=None) -> ()");
  // those that this processor has, the one in use first; "portable" is for tests
  m.def("_direct_conv3d_isas() -> str[]");
  // qkv [B, N, 3·C] -> out [B, N, C], written: self-attention of all tokens in bfloat16, where the processor has it
  m.def("_volume_attention(Tensor qkv, int heads, Tensor(a!) out) -> ()");
  m.def("_has_volume_attention() -> bool");
  // x [R, C], weight [O, C], bias [O] -> out [R, O], written: bfloat16, where the processor has it
  m.def("_linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("_has_linear() -> bool");
  // float32 x [B, D + 2, H + 2, W + 2, C], taps [27, C, O], bias [O] -> y [B, D, H, W, O], written
  m.def("_winograd_conv3d(Tensor x, Tensor taps, Tensor? bias, Tensor(a!) y, str? isa=None) -> ()");
  // out [B, C, D, H, W] is x with weights (1, 2, 1)/4 along three axes; where a pad is 1, x ends with out, whose
  // outermost plane there is left alone
  m.def("_blur3d(Tensor x, int[] pads, Tensor(a!) out, str? isa=None) -> ()");
  // x [R, C], gain [C] -> each row normalised, times gain
  m.def("_channel_norm(Tensor x, Tensor gain, float eps) -> Tensor");
  // x goes one step of a solver further, x0_prev becomes its estimate of the clean latent
  m.def(
      "_diffusion_step(Tensor(a!) x, Tensor estimate, Tensor coefficients, Tensor? noise, Tensor(b!)? x0_prev) -> ()");
  // x = GELU(x) by its tanh approximation, in place; x contiguous, float32 or bfloat16
  m.def("_gelu_(Tensor(a!) x, str? isa=None) -> ()");
  // instruction sets that were compiled in and that this processor has, the one in use first
  m.def("cpu_isas() -> str[]");
}
