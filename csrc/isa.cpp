#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace longattn {

#define X(isa) namespace isa { extern const Kernels kernels; }
LONGATTN_ISAS
#undef X

const std::vector<const Kernels*>& compiled_kernels() {
#define X(isa) &isa::kernels,
  static const std::vector<const Kernels*> all{LONGATTN_ISAS};
#undef X
  return all;
}

bool supported(const Kernels& k) {
#if defined(__x86_64__)
  if (!std::strcmp(k.isa, "v2")) return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  if (!std::strcmp(k.isa, "v3") || !std::strcmp(k.isa, "emulated"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return !std::strcmp(k.isa, "v4") ? v4 : v4 && __builtin_cpu_supports("avx512bf16");
#else
  return true;
#endif
}

const Kernels& active_kernels() {
  static const Kernels* chosen = [] {
    const char* wanted = std::getenv("LONGATTN_CPU_ISA");
    std::string usable;
    const Kernels* best = nullptr;
    for (const Kernels* k : compiled_kernels()) {
      if (!supported(*k)) continue;
      // a level for tests only: the widest kernels on narrow registers
      if (std::strcmp(k->isa, "emulated")) best = k;
      usable += (usable.empty() ? "" : ", ") + std::string(k->isa);
      if (wanted && !std::strcmp(wanted, k->isa)) return k;
    }
    if (wanted && *wanted)
      throw std::invalid_argument("longattn: LONGATTN_CPU_ISA must be one of " + usable + " on this machine, got " + wanted);
    if (!best) throw std::runtime_error("longattn: this CPU has none of the instruction sets the kernels were compiled for");
    return best;
  }();
  return *chosen;
}

}  // namespace longattn
