// Linear attention with FAVOR+ features: projection, exponential and products in one pass.
#include "kernels.h"
#include "linear_backward.h"
#include "linear_forward.h"

namespace longattn::LONGATTN_ISA {

void favor_forward(const LinearProblem& x, const LinearForward& y) {
  if (x.q.dtype == DType::f64) Forward<double, true>(x, y).run();
  else Forward<float, true>(x, y).run();
}
void favor_backward(const LinearProblem& x, const LinearBackward& y) {
  if (x.q.dtype == DType::f64) Backward<double, true>(x, y).run();
  else Backward<float, true>(x, y).run();
}

}  // namespace longattn::LONGATTN_ISA
