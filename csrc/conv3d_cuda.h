// Launchers of the CUDA convolutions. Free of PyTorch and of CUDA.
#pragma once

#include "conv3d_plan.h"

namespace meddiff {

// Bytes of workspace, 256-byte aligned, that the call on the current device needs.
int64_t norm_silu_conv3d_cuda_workspace(const ConvProblem& problem);
int64_t up_conv3d_cuda_workspace(const ConvProblem& problem);
int64_t norm_silu_conv3d_wgmma_workspace(const ConvProblem& problem);  // 0: the wgmma kernel cannot serve the call

// Launch on `stream` (a cudaStream_t) of the current device and return the cudaError_t as int. No tensor may be empty.
int norm_silu_conv3d_cuda(const ConvProblem& problem, void* workspace, void* stream);
int up_conv3d_cuda(const ConvProblem& problem, void* workspace, void* stream);
int norm_silu_conv3d_wgmma(const ConvProblem& problem, void* workspace, void* stream);  // compute capability 9.0

}  // namespace meddiff
