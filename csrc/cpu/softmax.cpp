// Softmax attention over listed tiles.
#include "kernels.h"
#include "softmax_backward.h"
#include "softmax_forward.h"

namespace longattn::LONGATTN_ISA {

// pairs of bfloat16 where the machine multiplies them
template <class F>
static auto with_factors(const SoftmaxProblem& x, F&& f) {
  if (x.q.dtype == DType::f64) return f(double{}, double{});
  if constexpr (has_pairs)
    if (x.q.dtype == DType::bf16) return f(float{}, Pair{});
  return f(float{}, float{});
}

void softmax_forward(const SoftmaxProblem& x, const SoftmaxForward& y) {
  with_factors(x, [&](auto t, auto a) { TileForward<decltype(t), decltype(a)>(x, y).run(); });
}
void softmax_backward(const SoftmaxProblem& x, const SoftmaxBackward& y) {
  if (x.q.dtype == DType::f64) TileBackward<double>(x, y).run();
  else TileBackward<float>(x, y).run();
}
int64_t softmax_workspace(const SoftmaxProblem& x, bool backward) {
  if (!backward)
    return with_factors(x, [&](auto t, auto a) { return TileForward<decltype(t), decltype(a)>(x, {}).workspace(); });
  if (x.q.dtype == DType::f64) return TileBackward<double>(x, {}).workspace();
  return TileBackward<float>(x, {}).workspace();
}

}  // namespace longattn::LONGATTN_ISA
