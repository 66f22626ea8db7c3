// norm_silu_conv3d on the GPU: which instance of the kernels (conv3d_march.h and its siblings) serves a call.
#include "conv3d_cuda.h"
#include "conv3d_run.h"

namespace meddiff {
namespace {

template <class T>
void (*kernel_of(ConvRoute route, const ConvPlan& plan))(ConvLaunch) {
  if (route == ConvRoute::project) return project_kernel<T>;
  if (plan.sets == 1) return plan.groups == 3 ? march_kernel<T, 2, 3, 1, 1> : march_kernel<T, 2, 2, 1, 1>;
  return plan.groups == 3 ? march_kernel<T, 2, 3, 3, 1> : march_kernel<T, 2, 2, 3, 1>;
}

}  // namespace

int64_t norm_silu_conv3d_cuda_workspace(const ConvProblem& problem) {
  ConvPlan plan;
  const ConvRoute route = plan_conv(problem, plan);
  return conv_workspace(problem, route, plan).end;
}

int norm_silu_conv3d_cuda(const ConvProblem& problem, void* workspace, void* stream) {
  ConvPlan plan;
  const ConvRoute route = plan_conv(problem, plan);
  auto* bytes = static_cast<unsigned char*>(workspace);
  const bool bf16 = problem.type == ConvType::bfloat16;
  if (problem.type == ConvType::float32) return run_direct<float>(problem, bytes, stream);
  if (route == ConvRoute::direct)
    return bf16 ? run_direct<device::Bf16>(problem, bytes, stream) : run_direct<device::Fp16>(problem, bytes, stream);
  return bf16 ? run_planned<device::Bf16>(problem, route, plan, kernel_of<device::Bf16>(route, plan), bytes, stream)
              : run_planned<device::Fp16>(problem, route, plan, kernel_of<device::Fp16>(route, plan), bytes, stream);
}

}  // namespace meddiff
