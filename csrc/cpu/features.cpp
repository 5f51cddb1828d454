// FAVOR+ features of rows, where an attention reads them more than once.
#include "features.h"

#include "favor.h"
#include "kernels.h"
#include "parallel.h"
#include "products.h"

namespace longattn::LONGATTN_ISA {

template <class T>
class Features {
  static constexpr int64_t block = 64;
  static constexpr int W = width<T>;
  struct Scratch {
    Matrix<T> raw, projected, dx;
    T* inverse;
    int64_t bytes;
    Scratch(char* memory, int64_t D, int64_t P, int64_t M) {
      Arena<T> arena{memory};
      raw = arena.take(block, padded<T>(D)), dx = arena.take(block, padded<T>(D));
      // features are written a vector past both halves of paired kinds
      projected = arena.take(block, std::max(padded<T>(P), padded<T>(M)) + W);
      inverse = arena.take(1, block).p;
      bytes = arena.bytes;
    }
  };

 public:
  explicit Features(const FeaturesProblem& x)
      : x(x), B(x.x.size[0]), H(x.x.size[1]), n(x.x.size[2]), D(x.x.size[3]), P(x.favor.projection.size[0]),
        kind(static_cast<Kind>(x.favor.kind)), M(is_paired(kind) ? 2 * P : P), root(static_cast<T>(x.favor.root)) {
    Arena<T> arena{nullptr};
    arena.take(padded<T>(P), padded<T>(D)), arena.take(padded<T>(D), padded<T>(P));
    shared_bytes = arena.bytes, scratch_bytes = Scratch(nullptr, D, P, M).bytes;
  }
  int64_t workspace() const { return shared_bytes + x.threads * scratch_bytes + 64; }

  void forward(const View& phi) {
    expect_shape(phi, "phi", {B, H, n, M}), expect_dtype(phi, "phi", working);
    run([&](Scratch& s, int64_t b, int64_t h, int64_t first, int64_t rows) {
      load_rows(s, b, h, first, rows);
      multiply<T, T>(rows, D, s.raw, projection_transposed, P, s.projected, false);
      for (int64_t r = 0; r < rows; ++r) {
        T a = features_of(s.projected.row(r), P, kind, dot(s.raw.row(r), s.raw.row(r), D) / 2);
        if (x.logs) {
          V<T> factor = broadcast(std::exp(a + static_cast<T>(x.shift)));
          for (int64_t i = 0; i < M; i += W) store(s.projected.row(r) + i, load(s.projected.row(r) + i) * factor);
        }
        store_row(s.projected.row(r), phi.as<T>() + ((b * H + h) * n + first + r) * M, M);
      }
    });
  }
  void backward(const FeaturesBackward& y) {
    for (const View* v : {&y.grad, &y.phi}) expect_shape(*v, "grad or phi", {B, H, n, M}), expect_dtype(*v, "grad or phi", working);
    expect_shape(y.dx, "dx", {B, H, n, D}), expect_dtype(y.dx, "dx", x.x.dtype);
    expect_shape(y.root_rows, "root_rows", {B, H, n}), expect_dtype(y.root_rows, "root_rows", working);
    run([&](Scratch& s, int64_t b, int64_t h, int64_t first, int64_t rows) {
      load_rows(s, b, h, first, rows);
      T down[block];
      for (int64_t r = 0; r < rows; ++r) {
        int64_t at = ((b * H + h) * n + first + r) * M;
        const View& grad = y.grad;
        T* g = s.projected.row(r);
        load_row(grad.as<T>() + b * grad.stride[0] + h * grad.stride[1] + (first + r) * grad.stride[2], grad.stride[3], M, g);
        down[r] = pull_back(y.phi.as<T>() + at, g);
      }
      multiply<T, T>(rows, P, s.projected, projection, D, s.dx, false);
      for (int64_t r = 0; r < rows; ++r) finish(s, b, h, first + r, r, down[r], y);
    });
  }

 private:
  const FeaturesProblem& x;
  int64_t B, H, n, D, P;
  Kind kind;
  int64_t M;
  T root;
  int64_t shared_bytes, scratch_bytes;
  Matrix<T> projection, projection_transposed;
  static constexpr DType working = std::is_same_v<T, double> ? DType::f64 : DType::f32;

  template <class F>
  void run(F&& f) {
    expect(x.workspace.elements() >= workspace(), "workspace is too small");
    char* memory = first_line(x.workspace.data);
    Arena<T> arena{memory};
    projection = arena.take(padded<T>(P), padded<T>(D)), projection_transposed = arena.take(padded<T>(D), padded<T>(P));
    const View& from = x.favor.projection;
    for (int64_t p = 0; p < padded<T>(P); ++p) {
      std::fill_n(projection.row(p), padded<T>(D), T(0));
      if (p < P) load_row(from.as<T>() + p * from.stride[0], from.stride[1], D, projection.row(p));
    }
    transpose(projection.p, projection.ld, P, D, projection_transposed.p, projection_transposed.ld);
    int64_t blocks = (n + block - 1) / block;
    parallel_tasks(B * H * blocks, x.threads, [&](int64_t task, int worker) {
      Scratch s(memory + shared_bytes + worker * scratch_bytes, D, P, M);
      int64_t first = task % blocks * block;
      f(s, task / blocks / H, task / blocks % H, first, std::min(block, n - first));
    });
  }
  T center(int64_t h, int64_t i) const {
    const View& mean = x.favor.mean;
    return mean ? mean.as<T>()[h * mean.stride[0] + i * mean.stride[1]] : T(0);
  }
  // rows as the kernel exp(q.k) sees them
  void load_rows(Scratch& s, int64_t b, int64_t h, int64_t first, int64_t rows) const {
    with_type(x.x.dtype, [&](auto type) {
      using From = decltype(type);
      if constexpr ((sizeof(T) == 8) == (sizeof(From) == 8)) {
        const View& from = x.x;
        const From* base = from.as<From>() + b * from.stride[0] + h * from.stride[1];
        for (int64_t r = 0; r < rows; ++r) load_row(base + (first + r) * from.stride[2], from.stride[3], D, s.raw.row(r));
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      T* row = s.raw.row(r);
      s.inverse[r] = x.favor.l2 ? normalize_row(row, D) : T(1);
      if (x.favor.mean)
        for (int64_t i = 0; i < D; ++i) row[i] -= center(h, i);
      for (int64_t i = 0; i < D; i += W) store(row + i, load(row + i) * root);
    }
  }
  // of a row's features to its projections; -> to |x|^2 / 2 with the sign of its part in them
  T pull_back(const T* phi, T* g) const {
    // no whole vectors at the end of a row: phi may end there
    T down = T(0);
    if (kind == Kind::positive) {
      V<T> total{};
      int64_t i = 0;
      for (; i + W <= P; i += W) {
        V<T> part = load(g + i) * load(phi + i);
        store(g + i, part), total += part;
      }
      down = sum<T>(total);
      for (; i < P; ++i) down += g[i] *= phi[i];
    } else if (kind == Kind::hyperbolic) {
      for (int64_t i = 0; i < P; ++i) {
        T up = phi[i] * g[i], low = phi[P + i] * g[P + i];
        down += up + low, g[i] = up - low;
      }
    } else if (kind == Kind::trig) {
      for (int64_t i = 0; i < P; ++i) {
        down -= phi[i] * g[i] + phi[P + i] * g[P + i];
        g[i] = phi[P + i] * g[i] - phi[i] * g[P + i];
      }
    } else {
      T factor = x.logs ? std::exp(static_cast<T>(x.shift)) : T(1);
      for (int64_t i = 0; i < P; ++i) g[i] = phi[i] > factor * T(relu_epsilon) ? factor * g[i] : T(0);
    }
    std::fill_n(g + P, padded<T>(P) - P, T(0));
    return x.logs ? down : T(0);
  }
  void finish(Scratch& s, int64_t b, int64_t h, int64_t at, int64_t r, T down, const FeaturesBackward& y) const {
    T *g = s.dx.row(r), *row = s.raw.row(r);
    for (int64_t i = 0; i < D; i += W) store(g + i, fma(broadcast(-down), load(row + i), load(g + i)));
    y.root_rows.as<T>()[(b * H + h) * n + at] = dot(g, row, D) / root;
    for (int64_t i = 0; i < D; i += W) store(g + i, load(g + i) * root);
    if (x.favor.l2) {
      // the unit row again, from the scaled one
      for (int64_t i = 0; i < D; ++i) row[i] = row[i] / root + center(h, i);
      T along = dot(g, row, D);
      for (int64_t i = 0; i < D; i += W)
        store(g + i, (load(g + i) - broadcast(along) * load(row + i)) * broadcast(s.inverse[r]));
    }
    with_type(x.x.dtype, [&](auto type) {
      using To = decltype(type);
      if constexpr ((sizeof(T) == 8) == (sizeof(To) == 8)) store_row(g, y.dx.as<To>() + ((b * H + h) * n + at) * D, D);
    });
  }
};

template <class F>
static auto with_features(const FeaturesProblem& x, F&& f) {
  expect(x.x.rank == 4 && x.x.size[3] > 0, "x must have 4 dimensions");
  expect(x.favor.kind >= 0 && x.favor.kind <= 3, "kind must be 0, 1, 2 or 3");
  DType working = x.x.dtype == DType::f64 ? DType::f64 : DType::f32;
  expect_shape(x.favor.projection, "projection", {x.favor.projection.size[0], x.x.size[3]});
  expect(x.favor.projection.size[0] > 0, "there must be a projection");
  expect_dtype(x.favor.projection, "projection", working);
  if (x.favor.mean) expect_shape(x.favor.mean, "mean", {x.x.size[1], x.x.size[3]}), expect_dtype(x.favor.mean, "mean", working);
  expect(x.threads > 0, "threads must be positive");
  if (working == DType::f64) return f(Features<double>(x));
  return f(Features<float>(x));
}

void features_forward(const FeaturesProblem& x, const View& phi) {
  with_features(x, [&](auto features) { features.forward(phi); });
}
void features_backward(const FeaturesProblem& x, const FeaturesBackward& y) {
  with_features(x, [&](auto features) { features.backward(y); });
}
int64_t features_workspace(const FeaturesProblem& x) {
  return with_features(x, [&](auto features) { return features.workspace(); });
}

}  // namespace longattn::LONGATTN_ISA
