// Prints the plans of csrc/conv3d_plan.h. Arguments: bytes of shared memory, C, O, k (4: transposed), channels of a
// residual with a 1³ convolution or 0, sizes D, H, W of out, and 1 for the wgmma kernel.
#include "../../csrc/conv3d_plan.h"

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc != 10) return 2;
  int64_t n[10];
  for (int i = 1; i < 10; ++i) n[i] = std::atoll(argv[i]);
  meddiff::ConvProblem p{};
  p.type = meddiff::ConvType::bfloat16;
  p.transposed = n[4] == 4;
  const int64_t inside = p.transposed ? 2 : 1;
  p.x = {&p, {1, n[2], n[6] / inside, n[7] / inside, n[8] / inside}, {}};
  p.weight = {&p, {n[3], n[2], n[4], n[4], n[4]}, {}};
  p.out = {&p, {1, n[3], n[6], n[7], n[8]}, {}};
  if (n[5]) p.residual = {&p, {1, n[5], n[6], n[7], n[8]}, {}}, p.residual_weight = p.residual;
  meddiff::ConvPlan plan;
  const bool fits = n[3] == 1 ? meddiff::make_project_plan(p, n[1], plan)
                              : meddiff::make_conv_plan(p, n[1], plan, n[9] == 1);
  std::printf("%d %d %d %d %d %d %lld %lld\n", fits, plan.slots, plan.chunk, plan.warps() * 32, plan.rows,
              plan.shared_bytes, static_cast<long long>(plan.planes),
              static_cast<long long>(plan.tasks() * plan.columns));
  return 0;
}
