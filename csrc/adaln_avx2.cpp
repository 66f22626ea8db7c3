#include "adaln_kernel.h"

namespace meddiff {

const AdaLnIsa kAdaLnAvx2{"avx2", adaln<8, float>, adaln<8, uint16_t>};

}  // namespace meddiff
