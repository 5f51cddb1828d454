// What one core can do with float32 register tiles: a 48 x 64 x 32 product that stays in the nearest cache. Compiled
// for the machine it runs on (-march=native), so it says what the hardware allows and not what this package reaches.
#include <chrono>

#if defined(__AVX512F__)
constexpr int bytes = 64, rows = 8;
#elif defined(__AVX__)
constexpr int bytes = 32, rows = 6;
#else
constexpr int bytes = 16, rows = 4;
#endif
constexpr int vectors = 2, width = bytes / 4, m = 48, depth = 64, n = 32;
typedef float vector __attribute__((vector_size(bytes)));

static void product(const float* a, const float* b, float* c) {
  for (int j = 0; j < n; j += vectors * width)
    for (int i = 0; i < m; i += rows) {
      vector acc[rows][vectors] = {};
      for (int k = 0; k < depth; ++k) {
        const vector* right = reinterpret_cast<const vector*>(b + k * n + j);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          float left = a[(i + r) * depth + k];
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) acc[r][v] += left * right[v];
        }
      }
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vectors; ++v) *reinterpret_cast<vector*>(c + (i + r) * n + j + v * width) = acc[r][v];
    }
}

// flop per second of one core in the best of `tries` short runs
extern "C" double tile_flops(int tries) {
  alignas(64) static thread_local float a[m * depth], b[depth * n], c[m * n];
  for (float& x : a) x = 1e-3f;
  for (float& x : b) x = 1e-3f;
  constexpr int repeats = 4000;
  double best = 0;
  for (int attempt = 0; attempt < tries; ++attempt) {
    auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repeats; ++i) {
      product(a, b, c);
      // what is not used would be optimised away
      asm volatile("" : : "r"(c) : "memory");
    }
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    double rate = 2.0 * m * depth * n * repeats / seconds;
    best = rate > best ? rate : best;
  }
  return best;
}
