// Which instruction set runs: the best one that was compiled and that this CPU has, or LONGATTN_CPU_ISA.
#pragma once
#include <vector>

#include "cpu/kernels.h"

namespace longattn {

const std::vector<const Kernels*>& compiled_kernels();
bool supported(const Kernels&);
const Kernels& active_kernels();

}  // namespace longattn
