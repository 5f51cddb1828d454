// Independent tasks over OpenMP threads, which torch shares. Nothing that can throw or allocate runs inside.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace longattn::LONGATTN_ISA {

// calls f(task, worker) for every task, worker < threads. Scratch belongs to the worker: a counter hands it out, because
// a process with two OpenMP runtimes can see one thread number twice.
template <class F>
inline void parallel_tasks(int64_t tasks, int threads, F&& f) {
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) f(i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<int> worker{0};
#pragma omp parallel num_threads(threads)
  {
    int me = worker.fetch_add(1);
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) f(i, me);
  }
}

}  // namespace longattn::LONGATTN_ISA
