// The products of the prefix-state engine, once for all that use them.
#include "prefix.h"

namespace longattn::LONGATTN_ISA {

LONGATTN_PRODUCTS(, float, float)
LONGATTN_PRODUCTS(, double, double)
#if (defined(__AVX512BF16__) && LONGATTN_VECTOR_BYTES == 64) || defined(LONGATTN_BF16_PAIRS)
LONGATTN_PRODUCTS(, float, Pair)
#endif
LONGATTN_NORMALIZERS(, float)
LONGATTN_NORMALIZERS(, double)

}  // namespace longattn::LONGATTN_ISA
