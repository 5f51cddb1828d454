// The table of this instruction set's kernels, and the probe that says what its register tiles can reach.
#include "kernels.h"

#include <chrono>

#include "prefix.h"

namespace longattn::LONGATTN_ISA {

void affine(const Affine&);
int64_t affine_workspace(const Affine&);
void linear_forward(const LinearProblem&, const LinearForward&);
void linear_backward(const LinearProblem&, const LinearBackward&);
void favor_forward(const LinearProblem&, const LinearForward&);
void favor_backward(const LinearProblem&, const LinearBackward&);
int64_t linear_workspace(int64_t head_dim, int64_t value_dim, int64_t features, int64_t projections, bool float64,
                         int threads);
void features_forward(const FeaturesProblem&, const View& phi);
void features_backward(const FeaturesProblem&, const FeaturesBackward&);
int64_t features_workspace(const FeaturesProblem&);
void softmax_forward(const SoftmaxProblem&, const SoftmaxForward&);
void softmax_backward(const SoftmaxProblem&, const SoftmaxBackward&);
int64_t softmax_workspace(const SoftmaxProblem&, bool backward);
void lsh_hash(const LshHash&);
void lsh_sort(const LshSort&);
int64_t lsh_workspace(int64_t head_dim, int64_t n_keys, int threads);
void toeplitz_forward(const ToeplitzProblem&, const ToeplitzForward&);
void toeplitz_backward(const ToeplitzProblem&, const ToeplitzBackward&);
int64_t toeplitz_workspace(const ToeplitzProblem&, bool backward);
void toeplitz_step(const ToeplitzStep&);
int64_t toeplitz_step_workspace(const ToeplitzStep&);
bool reversible_add(const ReversibleAdd&);

// GFLOP/s of one core in float32 tiles on a 64 x 64 x 64 product that stays in the first cache
static double peak_gflops(int64_t repeats) {
  constexpr int64_t n = 64, ld = 80;
  alignas(64) static thread_local float a[n * ld], b[n * ld], c[n * ld];
  for (int64_t i = 0; i < n * ld; ++i) a[i] = 1e-3f * static_cast<float>(i % 7), b[i] = 1e-3f, c[i] = 0;
  auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < repeats; ++i)
    outputs<float, float>(n, {}, n, {a, ld}, {b, ld}, n, {c, ld}, true);
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return 2e-9 * static_cast<double>(n * n * n * repeats) / seconds.count();
}

#define LONGATTN_TEXT(x) #x
#define LONGATTN_NAME(x) LONGATTN_TEXT(x)
extern const Kernels kernels = {
    LONGATTN_NAME(LONGATTN_ISA), affine, affine_workspace, linear_forward, linear_backward, favor_forward, favor_backward,
    linear_workspace, features_forward, features_backward, features_workspace,
    softmax_forward, softmax_backward, softmax_workspace, lsh_hash, lsh_sort, lsh_workspace, toeplitz_forward,
    toeplitz_backward, toeplitz_workspace, toeplitz_step, toeplitz_step_workspace, reversible_add, peak_gflops,
};

}  // namespace longattn::LONGATTN_ISA
