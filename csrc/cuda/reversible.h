// The sum of a reversible layer in CUDA C++. Launches on `stream` (a cudaStream_t) of the current device, waits for
// nothing, and returns the launch's cudaError_t.
#pragma once
#include "common/view.h"

namespace longattn::cuda {

struct ReversibleAdd {
  View x, f;     // [N], contiguous; float32, bfloat16 or float16, each with its own dtype
  View out;      // [N], the dtype of x; may be x itself
  View flag;     // [1] int32, or empty: becomes 1 where a result reaches the limit
  double grid = 0;   // a power of two, or 0: nothing is rounded
  double limit = 0;
  bool subtract = false;
};

int reversible_add(const ReversibleAdd& x, uintptr_t stream);

}  // namespace longattn::cuda
