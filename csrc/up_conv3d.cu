// up_conv3d on the GPU: which instance of the kernels (conv3d_march.h and its siblings) serves a call.
#include "conv3d_cuda.h"
#include "conv3d_run.h"

namespace meddiff {

int64_t up_conv3d_cuda_workspace(const ConvProblem& problem) {
  ConvPlan plan;
  const ConvRoute route = plan_conv(problem, plan);
  return conv_workspace(problem, route, plan).end;
}

int up_conv3d_cuda(const ConvProblem& problem, void* workspace, void* stream) {
  ConvPlan plan;
  const ConvRoute route = plan_conv(problem, plan);
  auto* bytes = static_cast<unsigned char*>(workspace);
  const bool bf16 = problem.type == ConvType::bfloat16;
  if (problem.type == ConvType::float32) return run_direct<float>(problem, bytes, stream);
  if (route == ConvRoute::direct)
    return bf16 ? run_direct<device::Bf16>(problem, bytes, stream) : run_direct<device::Fp16>(problem, bytes, stream);
  return bf16 ? run_planned<device::Bf16>(problem, route, plan, march_kernel<device::Bf16, 4, 1, 4, 2>, bytes, stream)
              : run_planned<device::Fp16>(problem, route, plan, march_kernel<device::Fp16, 4, 1, 4, 2>, bytes, stream);
}

}  // namespace meddiff
