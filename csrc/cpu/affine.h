// A product of whole matrices on the CPU: what crosses the boundary.
#pragma once
#include "common/view.h"

namespace longattn {

// out = a b + bias
struct Affine {
  View a;          // [M, K], any strides
  View b;          // [K, N], any strides, the dtype of a
  View bias;       // [N], the dtype of a; empty: none
  View out;        // [M, N], rows without gaps; the dtype of a, or what it is summed in
  View workspace;  // bytes, as affine_workspace says
  bool split = false;  // whether workers share the depth and not the rows; then out is what it is summed in
  int threads = 1;
};

}  // namespace longattn
