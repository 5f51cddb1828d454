// FAVOR+ features as a tensor, on the CPU: what crosses the boundary. The mathematics is in longattn/features.py.
#pragma once
#include "linear.h"

namespace longattn {

// phi(x) e^(a + shift) with `logs`, else phi(x), which is a feature up to a factor of its row
struct FeaturesProblem {
  View x;                  // [B, H, n, D]
  FavorMap favor;
  double shift = 0;
  bool logs = false;
  int threads = 1;
  View workspace;          // bytes: features_workspace(...)
};

struct FeaturesBackward {
  View grad, phi;          // [B, H, n, M] in the working type; phi as the forward left it
  View dx;                 // like x
  View root_rows;          // [B, H, n] in the working type: what each row adds to the gradient of root
};

}  // namespace longattn
