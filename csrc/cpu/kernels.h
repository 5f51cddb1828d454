// One entry point of every CPU kernel for every instruction set it was compiled for.
#pragma once
#include "linear.h"

namespace longattn {

struct Kernels {
  const char* isa;
  void (*linear_forward)(const LinearProblem&, const LinearForward&);
  void (*linear_backward)(const LinearProblem&, const LinearBackward&);
  void (*favor_forward)(const LinearProblem&, const LinearForward&);
  void (*favor_backward)(const LinearProblem&, const LinearBackward&);
  int64_t (*linear_workspace)(int64_t head_dim, int64_t value_dim, int64_t features, int64_t projections, bool float64,
                              int threads);
  double (*peak_gflops)(int64_t repeats);
};

}  // namespace longattn
