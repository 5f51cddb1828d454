// Linear attention with elementwise feature maps (elu + 1, relu, identity).
#include "kernels.h"
#include "linear_backward.h"
#include "linear_forward.h"

namespace longattn::LONGATTN_ISA {

void linear_forward(const LinearProblem& x, const LinearForward& y) {
  if (x.q.dtype == DType::f64) Forward<double, false>(x, y).run();
  else Forward<float, false>(x, y).run();
}
void linear_backward(const LinearProblem& x, const LinearBackward& y) {
  if (x.q.dtype == DType::f64) Backward<double, false>(x, y).run();
  else Backward<float, false>(x, y).run();
}
// for every map: P is 0 without a projection
int64_t linear_workspace(int64_t D, int64_t E, int64_t M, int64_t P, bool float64, int threads) {
  Sizes sizes{D, E, M, P};
  return float64 ? workspace_bytes<double>(sizes, threads) : workspace_bytes<float>(sizes, threads);
}

}  // namespace longattn::LONGATTN_ISA
