// The products of tiles.
#include "products.h"

namespace longattn::LONGATTN_ISA {

LONGATTN_MULTIPLY(, float, float)
LONGATTN_MULTIPLY(, double, double)
LONGATTN_MULTIPLY(, float, Pair)

}  // namespace longattn::LONGATTN_ISA
