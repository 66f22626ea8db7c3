// norm_silu_conv3d by wgmma (conv3d_wgmma.h), compiled for sm_90a alone.
#include "conv3d_cuda.h"
#include "conv3d_run.h"
#include "conv3d_wgmma.h"

namespace meddiff {
namespace {

template <class T>
int run_wgmma(const ConvProblem& problem, const ConvPlan& plan, unsigned char* workspace, void* stream) {
  const auto kernel = plan.chunk == 4 ? plan.groups == 3 ? wgmma_kernel<T, 4, 3> : wgmma_kernel<T, 4, 2>
                      : plan.groups == 3 ? wgmma_kernel<T, 3, 3> : wgmma_kernel<T, 3, 2>;
  return run_planned<T>(problem, ConvRoute::wgmma, plan, kernel, workspace, stream);
}

}  // namespace

int64_t norm_silu_conv3d_wgmma_workspace(const ConvProblem& problem) {
  ConvPlan plan;
  return plan_wgmma(problem, plan) ? conv_workspace(problem, ConvRoute::wgmma, plan).end : 0;
}

int norm_silu_conv3d_wgmma(const ConvProblem& problem, void* workspace, void* stream) {
  ConvPlan plan;
  if (!plan_wgmma(problem, plan)) return static_cast<int>(cudaErrorInvalidValue);
  auto* bytes = static_cast<unsigned char*>(workspace);
  return problem.type == ConvType::bfloat16 ? run_wgmma<device::Bf16>(problem, plan, bytes, stream)
                                            : run_wgmma<device::Fp16>(problem, plan, bytes, stream);
}

}  // namespace meddiff
