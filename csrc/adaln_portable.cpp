#include "adaln_kernel.h"

namespace meddiff {

const AdaLnIsa kAdaLnPortable{"portable", adaln<4, float>, adaln<4, uint16_t>};

}  // namespace meddiff
