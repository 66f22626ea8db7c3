#include "adaln_kernel.h"

namespace meddiff {

const AdaLnIsa kAdaLnAvx512{"avx512", adaln<16, float>, adaln<16, uint16_t>};

}  // namespace meddiff
