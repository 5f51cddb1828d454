// Linear attention with a factor for each relative position.
#include "kernels.h"
#include "toeplitz_fft.h"
#include "toeplitz_sweep.h"

namespace longattn::LONGATTN_ISA {

static DType working_type(const ToeplitzProblem& x) { return x.v.dtype == DType::f64 ? DType::f64 : DType::f32; }

static void check(const ToeplitzProblem& x) {
  for (const View* v : {&x.q, &x.k, &x.v}) expect(v->rank == 4, "q, k and v must have 4 dimensions");
  int64_t B = x.q.size[0], Hq = x.q.size[1], L = x.q.size[2], M = x.q.size[3], H = x.k.size[1], S = x.k.size[2];
  expect(H > 0 ? Hq % H == 0 : Hq == 0, "query heads must be a multiple of key heads");
  expect(M > 0 && x.v.size[3] > 0, "head dimensions must be positive");
  expect_shape(x.k, "k", {B, H, S, M}), expect_shape(x.v, "v", {B, H, S, x.v.size[3]});
  for (const View* v : {&x.q, &x.k, &x.c}) expect_dtype(*v, "q, k or c", working_type(x));
  expect(x.reach >= 0 && x.reach < (int64_t(1) << 40), "reach must not be negative");
  expect_shape(x.c, "c", {Hq, 2 * x.reach + 1});
  if (x.mask) expect_shape(x.mask, "mask", {B, S}), expect_dtype(x.mask, "mask", DType::boolean);
  expect(x.threads > 0, "threads must be positive");
  if (!x.cu_seqlens) return;
  expect(x.offset == 0, "packed sequences start at the first key");
  Sequences{x.cu_seqlens, x.cu_seqlens.size[0] - 1, segment_tokens}.check(B, L, S);
}

template <class F>
static auto with_working_type(const ToeplitzProblem& x, F&& f) {
  return working_type(x) == DType::f64 ? f(double{}) : f(float{});
}
template <class T, Pass pass>
static void run(const ToeplitzProblem& x, const ToeplitzForward* y, const ToeplitzBackward* dy) {
  ToeplitzSweep<T, pass> sweep(x, y, dy);
  expect(x.workspace.elements() >= sweep.workspace(), "workspace is too small");
  sweep.run();
}

// the gradients of numerator and normalizer, row by row
template <class T>
static void load_gradients(const ToeplitzProblem& x, const ToeplitzBackward& y) {
  int64_t Hq = x.q.size[1], L = x.q.size[2], E = x.v.size[3];
  constexpr int64_t block = 64;
  int64_t blocks = (L + block - 1) / block;
  parallel_tasks(x.q.size[0] * Hq * blocks, x.threads, [&](int64_t task, int) {
    int64_t b = task / blocks / Hq, h = task / blocks % Hq, first = task % blocks * block;
    for (int64_t i = first; i < std::min(first + block, L); ++i) {
      T* to = y.rows.as<T>() + ((b * Hq + h) * L + i) * (E + 1);
      with_type(x.v.dtype, [&](auto type) {
        using From = decltype(type);
        if constexpr ((sizeof(T) == 8) == (sizeof(From) == 8)) {
          auto at = [&](const View& v) { return v.as<From>() + b * v.stride[0] + h * v.stride[1] + i * v.stride[2]; };
          const From *grad = at(y.grad_out), *out = x.normalize ? at(y.out) : nullptr;
          T z = y.normalizer.as<T>()[(b * Hq + h) * L + i];
          T inverse = !x.normalize ? T(1) : z == T(0) ? T(0) : 1 / z, down = 0;
          for (int64_t e = 0; e < E; ++e) {
            to[e] = convert(grad[e * y.grad_out.stride[3]]) * inverse;
            if (out) down -= to[e] * convert(out[e * y.out.stride[3]]);
          }
          const View& own = y.grad_normalizer;
          if (own) down = own.as<T>()[b * own.stride[0] + h * own.stride[1] + i * own.stride[2]];
          to[E] = down;
        }
      });
    }
  });
}

void toeplitz_forward(const ToeplitzProblem& x, const ToeplitzForward& y) {
  check(x);
  int64_t B = x.q.size[0], Hq = x.q.size[1], L = x.q.size[2];
  expect_shape(y.out, "out", {B, Hq, L, x.v.size[3]}), expect_dtype(y.out, "out", x.v.dtype);
  expect(y.out.stride[3] == 1, "out must have rows without gaps");
  expect_shape(y.normalizer, "normalizer", {B, Hq, L}), expect_dtype(y.normalizer, "normalizer", working_type(x));
  with_working_type(x, [&](auto t) {
    if (x.fft) fft_forward<decltype(t)>(x, y);
    else run<decltype(t), Pass::forward>(x, &y, nullptr);
  });
}
void toeplitz_backward(const ToeplitzProblem& x, const ToeplitzBackward& y) {
  check(x);
  int64_t B = x.q.size[0], Hq = x.q.size[1], L = x.q.size[2], M = x.q.size[3], S = x.k.size[2], E = x.v.size[3];
  expect_shape(y.grad_out, "grad_out", {B, Hq, L, E}), expect_dtype(y.grad_out, "grad_out", x.v.dtype);
  expect_shape(y.normalizer, "normalizer", {B, Hq, L}), expect_dtype(y.normalizer, "normalizer", working_type(x));
  if (x.normalize) {
    expect_shape(y.out, "out", {B, Hq, L, E}), expect_dtype(y.out, "out", x.v.dtype);
    expect(!y.grad_normalizer, "a normalizer that was divided by has no gradient of its own");
  } else if (y.grad_normalizer) {
    expect_shape(y.grad_normalizer, "grad_normalizer", {B, Hq, L});
    expect_dtype(y.grad_normalizer, "grad_normalizer", working_type(x));
  }
  expect_shape(y.rows, "rows", {B, Hq, L, E + 1}), expect_dtype(y.rows, "rows", working_type(x));
  expect_shape(y.dq, "dq", {B, Hq, L, M}), expect_shape(y.dk, "dk", {B, Hq, S, M}), expect_shape(y.dv, "dv", {B, Hq, S, E});
  for (const View* v : {&y.dq, &y.dk, &y.dc}) expect_dtype(*v, "dq, dk or dc", working_type(x));
  expect((y.dv.dtype == DType::f64) == (working_type(x) == DType::f64), "dv has a dtype that does not fit");
  expect_shape(y.dc, "dc", {Hq, 2 * x.reach + 1});
  for (const View* v : {&y.dq, &y.dk, &y.dv, &y.dc}) expect(v->stride[v->rank - 1] == 1, "results must have rows without gaps");
  with_working_type(x, [&](auto t) {
    using T = decltype(t);
    load_gradients<T>(x, y);
    if (x.fft) return fft_backward<T>(x, y);
    run<T, Pass::queries>(x, nullptr, &y);
    run<T, Pass::keys>(x, nullptr, &y);
  });
}
int64_t toeplitz_workspace(const ToeplitzProblem& x, bool backward) {
  check(x);
  return with_working_type(x, [&](auto t) {
    using T = decltype(t);
    if (x.fft) return fft_workspace<T>(x, backward);
    if (!backward) return ToeplitzSweep<T, Pass::forward>(x, nullptr, nullptr).workspace();
    return std::max(ToeplitzSweep<T, Pass::queries>(x, nullptr, nullptr).workspace(),
                    ToeplitzSweep<T, Pass::keys>(x, nullptr, nullptr).workspace());
  });
}

}  // namespace longattn::LONGATTN_ISA
