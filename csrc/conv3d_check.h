// What norm_silu_conv3d and up_conv3d want of their tensors on the GPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "conv3d_plan.h"

namespace meddiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Fills a ConvProblem; `name` is the operator's.
class ConvArguments {
 public:
  ConvProblem problem{};

  ConvArguments(const char* name, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& pads,
                const Tensor& out)
      : name_(name), type_(x.scalar_type()), device_(x.get_device_index()) {
    STD_TORCH_CHECK(type_ == ScalarType::Float || type_ == ScalarType::BFloat16 || type_ == ScalarType::Half, name,
                    ": x must be float32, bfloat16 or float16, got ", type_);
    STD_TORCH_CHECK(pads.size() == 6, name, ": pads must be 6 numbers, got ", pads.size());
    problem.type = type_ == ScalarType::Float      ? ConvType::float32
                   : type_ == ScalarType::BFloat16 ? ConvType::bfloat16
                                                   : ConvType::float16;
    for (int i = 0; i < 6; ++i) {
      STD_TORCH_CHECK(pads[i] == 0 || pads[i] == 1, name, ": pads must be 0 or 1, got ", pads[i]);
      problem.pads[i] = static_cast<int>(pads[i]);
    }
    view("x", x, problem.x);
    view("weight", weight, problem.weight);
    view("out", out, problem.out);
  }

  void view(const char* what, const Tensor& t, ConvTensor& to) {
    same("[B, C, D, H, W]", what, t, 5);
    to.data = t.const_data_ptr();
    for (int i = 0; i < 5; ++i) {
      to.size[i] = t.size(i);
      to.stride[i] = t.stride(i);
      STD_TORCH_CHECK(i < 2 || t.size(i) < INT32_MAX / 2, name_, ": ", what, " must have fewer than 2^30 planes, got ",
                      t.size(i));
    }
  }

  // A contiguous copy of a bias [n] of x's dtype; null if there is none.
  const void* bias(const char* what, const OptionalTensor& t, int64_t n) {
    if (!t) return nullptr;
    same("[O]", what, *t, 1);
    STD_TORCH_CHECK(t->size(0) == n, name_, ": ", what, " must be [", n, "], got [", t->size(0), "]");
    kept_.push_back(torch::stable::contiguous(*t));
    return kept_.back().const_data_ptr();
  }

  // A contiguous copy of float32 [B, C]; null if there is none.
  const float* modulation(const char* what, const OptionalTensor& t) {
    if (!t) return nullptr;
    const auto& size = problem.x.size;
    STD_TORCH_CHECK(t->dim() == 2 && t->scalar_type() == ScalarType::Float && t->size(0) == size[0] &&
                        t->size(1) == size[1] && t->get_device_index() == device_,
                    name_, ": ", what, " must be float32 [", size[0], ", ", size[1], "] on x's device");
    kept_.push_back(torch::stable::contiguous(*t));
    return kept_.back().const_data_ptr<float>();
  }

  void statistics(const OptionalTensor& t) {
    if (!t) return;
    const int64_t samples = problem.out.size[0], outputs = problem.out.size[1];
    STD_TORCH_CHECK(t->dim() == 3 && t->scalar_type() == ScalarType::Float && t->size(0) == samples &&
                        t->size(1) == 2 && t->size(2) == outputs && t->is_contiguous() &&
                        t->get_device_index() == device_,
                    name_, ": statistics must be contiguous float32 [", samples, ", 2, ", outputs, "] on x's device");
    problem.statistics = t->mutable_data_ptr<float>();
  }

  // out must be what x and pads give, with these channels.
  void check_output(int64_t outputs) const {
    const auto& size = problem.out.size;
    STD_TORCH_CHECK(size[0] == problem.x.size[0] && size[1] == outputs, name_, ": out must be [", problem.x.size[0],
                    ", ", outputs, ", D, H, W], got [", size[0], ", ", size[1], ", …]");
    for (int axis = 0; axis < 3; ++axis)
      STD_TORCH_CHECK(size[2 + axis] == problem.output_size(axis), name_, ": out must have ",
                      problem.output_size(axis), " planes along ", "DHW"[axis], " for ", problem.x.size[2 + axis],
                      " of x and these pads, got ", size[2 + axis]);
  }

 private:
  void same(const char* shape, const char* what, const Tensor& t, int64_t dimensions) const {
    STD_TORCH_CHECK(t.dim() == dimensions && t.scalar_type() == type_ && t.get_device_index() == device_, name_, ": ",
                    what, " must be ", shape, " of x's dtype, ", type_, ", on x's device, got ", t.dim(),
                    " dimensions of type ", t.scalar_type());
  }

  const char* name_;
  ScalarType type_;
  int device_;
  std::vector<Tensor> kept_;
};

}  // namespace meddiff
