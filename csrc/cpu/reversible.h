// The sum of a reversible layer on the CPU: what crosses the boundary. The mathematics is in
// longattn/reference/reversible.py.
#pragma once
#include "common/view.h"

namespace longattn {

struct ReversibleAdd {
  View x, f;           // [N], contiguous; each with its own dtype
  View out;            // [N], the dtype of x; may be x itself
  double grid = 0;     // a power of two, or 0: nothing is rounded
  double limit = 0;    // with a grid: what no result may reach
  bool subtract = false;
  int threads = 1;
};

}  // namespace longattn
