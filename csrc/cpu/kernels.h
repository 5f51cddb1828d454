// One entry point of every CPU kernel for every instruction set it was compiled for.
#pragma once
#include "affine.h"
#include "features.h"
#include "linear.h"
#include "lsh.h"
#include "reversible.h"
#include "softmax.h"
#include "toeplitz.h"

namespace longattn {

struct Kernels {
  const char* isa;
  void (*affine)(const Affine&);
  int64_t (*affine_workspace)(const Affine&);
  void (*linear_forward)(const LinearProblem&, const LinearForward&);
  void (*linear_backward)(const LinearProblem&, const LinearBackward&);
  void (*favor_forward)(const LinearProblem&, const LinearForward&);
  void (*favor_backward)(const LinearProblem&, const LinearBackward&);
  int64_t (*linear_workspace)(int64_t head_dim, int64_t value_dim, int64_t features, int64_t projections, bool float64,
                              int threads);
  void (*features_forward)(const FeaturesProblem&, const View& phi);
  void (*features_backward)(const FeaturesProblem&, const FeaturesBackward&);
  int64_t (*features_workspace)(const FeaturesProblem&);
  void (*softmax_forward)(const SoftmaxProblem&, const SoftmaxForward&);
  void (*softmax_backward)(const SoftmaxProblem&, const SoftmaxBackward&);
  int64_t (*softmax_workspace)(const SoftmaxProblem&, bool backward);
  void (*lsh_hash)(const LshHash&);
  void (*lsh_sort)(const LshSort&);
  int64_t (*lsh_workspace)(int64_t head_dim, int64_t n_keys, int threads);
  void (*toeplitz_forward)(const ToeplitzProblem&, const ToeplitzForward&);
  void (*toeplitz_backward)(const ToeplitzProblem&, const ToeplitzBackward&);
  int64_t (*toeplitz_workspace)(const ToeplitzProblem&, bool backward);
  void (*toeplitz_step)(const ToeplitzStep&);
  int64_t (*toeplitz_step_workspace)(const ToeplitzStep&);
  bool (*reversible_add)(const ReversibleAdd&);
  double (*peak_gflops)(int64_t repeats);
};

}  // namespace longattn
