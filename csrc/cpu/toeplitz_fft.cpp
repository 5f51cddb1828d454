// The Toeplitz product by Fourier transforms: for features f and value columns e, the product along the sequence of
// k_f v_e, contracted with q_f. Lanes are columns, a point's real and imaginary parts are two panels of them: as the
// factors are real, those never mix.
#include "toeplitz_fft.h"

#include <vector>

#include "parallel.h"

namespace longattn::LONGATTN_ISA {

template <class T, bool backward>
class ToeplitzFft {
  static constexpr int W = width<T>;
  static constexpr int64_t block = 64;           // tokens that are laid out at a time, whole vectors
  static constexpr int buffers = backward ? 2 : 1;

 public:
  ToeplitzFft(const ToeplitzProblem& x, const ToeplitzForward* y, const ToeplitzBackward* dy) : x(x), y(y), dy(dy) {
    Hq = x.q.size[1], M = x.q.size[3], E = x.v.size[3], H = x.k.size[1], groups = H ? Hq / H : 1;
    part_features = round_up((M + most_parts - 1) / most_parts, 2 * W);
    parts = (M + part_features - 1) / part_features;
    int64_t L = x.q.size[2], S = x.k.size[2];
    longest = transform_length(std::max<int64_t>(L + S - 1, 1));
    // heads at a time: enough for all threads, as each takes memory
    wave = std::clamp<int64_t>((2 * x.threads + parts - 1) / parts, 1, std::max<int64_t>(Hq, 1));
    Carver at{nullptr};
    carve(at, L, S, longest);
    bytes = at.bytes;
    std::fill_n(one, W, T(1)), std::fill_n(zero, W, T(0));
  }
  int64_t workspace() const { return bytes + 64; }

  void run() {
    int64_t filled = 0;
    for_pieces(x, [&](const Piece& next) {
      piece = next;
      int64_t length = transform_length(piece.n_q + piece.n_k - 1);
      Carver at{first_line(x.workspace.data)};
      heads.clear();
      carve(at, piece.n_q, piece.n_k, length);
      if (backward && !filled) std::fill_n(dc, Hq * (2 * x.reach + 1), 0.0);
      transform = Transform<T>(table, length), exact = Transform<double>(exact_table, length);
      if (filled != length) transform.fill(), exact.fill();
      filled = length;
      parallel_tasks(Hq, x.threads, [&](int64_t h, int worker) { find_spectrum(worker, h); });
      for (first_head = 0; first_head < Hq; first_head += wave) {
        int64_t now = std::min(wave, Hq - first_head), blocks = (std::max(piece.n_q, piece.n_k) + block - 1) / block;
        parallel_tasks(now * blocks, x.threads, [&](int64_t task, int worker) { lay_out(worker, task / blocks, task % blocks); });
        parallel_tasks(now * parts, x.threads, [&](int64_t task, int worker) { part(worker, task / parts, task % parts); });
        parallel_tasks(now * blocks, x.threads, [&](int64_t task, int worker) { give_back(worker, task / blocks, task % blocks); });
        if (backward) parallel_tasks(now, x.threads, [&](int64_t task, int worker) { add_factors(worker, task); });
      }
    });
    if (!backward) return;
    int64_t n = Hq * (2 * x.reach + 1);
    for (int64_t i = 0; i < n; ++i) dy->dc.as<T>()[i] = filled ? static_cast<T>(dc[i]) : T(0);
  }

 private:
  const ToeplitzProblem& x;
  const ToeplitzForward* y;
  const ToeplitzBackward* dy;
  int64_t Hq, H, M, E, groups, part_features, parts, longest, wave, bytes, first_head = 0;
  Piece piece{};
  Transform<T> transform{nullptr, 1};
  Transform<double> exact{nullptr, 1};
  T *table, *spectra, *rows;
  double *exact_table, *dc;
  bool* seen;
  char* scratch;
  int64_t scratch_bytes;
  std::vector<FftHead<T>> heads;
  T one[W], zero[W];

  void carve(Carver& at, int64_t n_q, int64_t n_k, int64_t length) {
    // gradients of factors are summed over all pieces: before what depends on one
    dc = at.take<double>(backward ? Hq * (2 * x.reach + 1) : 0);
    table = at.take<T>(2 * longest), exact_table = at.take<double>(2 * longest);
    spectra = at.take<T>(Hq * 2 * length), seen = at.take<bool>(Hq * n_q);
    // a vector more, as sums over lanes go by whole vectors of tokens; the spectra of factors take two in float64
    scratch_bytes = 2 * (length + W) * 2 * vector_bytes + 2 * round_up(std::max(M, E) + W, W) * static_cast<int64_t>(sizeof(T)) + 64;
    scratch_bytes = round_up(scratch_bytes + block * (padded<T>(M) + W) * static_cast<int64_t>(sizeof(T)), 64);
    scratch = at.take<char>(x.threads * scratch_bytes);
    for (int64_t i = 0; i < wave; ++i) heads.emplace_back(at, M, E, n_q, n_k, length, parts, backward);
  }
  char* buffer(int worker, int i) const {
    return scratch + worker * scratch_bytes + i * (transform.length() + W) * 2 * vector_bytes;
  }
  T* row_of(int worker) const { return reinterpret_cast<T*>(buffer(worker, 2)); }
  T* own_spectrum(int64_t h) const { return spectra + h * 2 * transform.length(); }

  // ---- factors

  // f(shift, index): the factor of each i - j, which is at c[index], shifts from the smallest place on the circle on
  template <class F>
  void at_place(int64_t place, F&& f) const {
    int64_t shift = place < piece.n_q ? place : place - transform.length();
    if (place >= piece.n_q && shift <= -piece.n_k) return;
    int64_t t = -shift - piece.offset;
    if (!x.is_causal || t <= 0) f(std::clamp(t, -x.reach, x.reach) + x.reach);
  }
  bool padded_key(int64_t j) const {
    return x.mask && x.mask.as<bool>()[piece.b * x.mask.stride[0] + (piece.first_k + j) * x.mask.stride[1]];
  }
  // lane 0: factors, lane 1: how many keys a query sees, as the transforms leave rounding where the sum of no weight is 0
  void find_spectrum(int worker, int64_t h) {
    double* const both[2] = {reinterpret_cast<double*>(buffer(worker, 0)), reinterpret_cast<double*>(buffer(worker, 1))};
    const T* c = x.c.as<T>() + h * x.c.stride[0];
    T* to = own_spectrum(h);
    bool* see = seen + h * piece.n_q;
    double scale = 1 / static_cast<double>(transform.length());
    auto get = [&](auto which, int64_t i) {
      Point<double> point{};
      if (which) point.re[1] = i < piece.n_k && !padded_key(i) ? 1 : 0;
      else at_place(i, [&](int64_t index) {
        point.re[0] = static_cast<double>(c[index * x.c.stride[1]]), point.re[1] = point.re[0] > 0 ? 1 : 0;
      });
      return point;
    };
    auto put = [&](auto which, int64_t i, Point<double> point) {
      if (which == 0 && i < piece.n_q) see[i] = point.re[1] * scale > 0.5;
    };
    exact.convolve<2>(both, get, put, [&](int64_t first, int64_t count) {
      for (int64_t p = first; p < first + count; ++p) {
        double* at = both[0] + p * exact.point;
        Point<double> a = load_point(at), b = load_point(both[1] + p * exact.point);
        to[2 * p] = static_cast<T>(a.re[0] * scale), to[2 * p + 1] = static_cast<T>(a.im[0] * scale);
        store_point(at, Point<double>{a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re});
      }
    });
  }
  void add_factors(int worker, int64_t slot) {
    double* const only[1] = {reinterpret_cast<double*>(buffer(worker, 0))};
    double *to = dc + (first_head + slot) * (2 * x.reach + 1), scale = 1 / static_cast<double>(transform.length());
    const double* parts_ = heads[slot].correlation;
    exact.convolve<1>(
        only, [](int, int64_t) { return Point<double>{}; },
        [&](int, int64_t i, Point<double> point) { at_place(i, [&](int64_t index) { to[index] += point.re[0] * scale; }); },
        [&](int64_t first, int64_t count) {
          for (int64_t p = first; p < first + count; ++p) {
            Point<double> point{};
            for (int64_t part = 0; part < parts; ++part) {
              const double* from = parts_ + 2 * (part * transform.length() + p);
              point.re[0] += from[0], point.im[0] += from[1];
            }
            store_point(only[0] + p * exact.point, point);
          }
        });
  }

  // ---- rows to panels

  template <class F>
  void with_row(const View& from, int64_t b, int64_t h, int64_t i, int64_t n, T* to, F&& put) const {
    with_type(from.dtype, [&](auto type) {
      using From = decltype(type);
      if constexpr ((sizeof(T) == 8) == (sizeof(From) == 8)) {
        load_row(from.as<From>() + b * from.stride[0] + h * from.stride[1] + i * from.stride[2], from.stride[3], n, to);
        put(to);
      }
    });
  }
  void lay_out(int worker, int64_t slot, int64_t which) {
    const FftHead<T>& u = heads[slot];
    int64_t h = first_head + slot, kv = h / groups;
    T* row = row_of(worker);
    auto past = [&](const Panels<T>& to, int64_t i, int64_t n) { std::fill_n(row, padded<T>(n), T(0)), to.put_row(i, n, row); };
    for (int64_t i = which * block; i < (which + 1) * block; ++i) {
      if (i < piece.n_q) {
        with_row(x.q, piece.b, h, piece.first_q + i, M, row, [&](T* q) { u.q.put_row(i, M, q); });
        if (backward && seen[h * piece.n_q + i]) {
          const T* from = dy->rows.template as<T>() + ((piece.b * Hq + h) * x.q.size[2] + piece.first_q + i) * (E + 1);
          load_row(from, 1, E, row), u.g.put_row(i, E, row), u.down[i] = from[E];
        } else if (backward) {
          past(u.g, i, E), u.down[i] = T(0);
        }
      } else if (i < padded<T>(piece.n_q)) {
        past(u.q, i, M);
        if (backward) past(u.g, i, E), u.down[i] = T(0);
      }
      if (i < piece.n_k && !padded_key(i)) {
        with_row(x.k, piece.b, kv, piece.first_k + i, M, row, [&](T* k) { u.k.put_row(i, M, k); });
        with_row(x.v, piece.b, kv, piece.first_k + i, E, row, [&](T* v) { u.v.put_row(i, E, v); });
      } else if (i < padded<T>(piece.n_k)) {
        past(u.k, i, M), past(u.v, i, E);
      }
    }
  }

  // ---- a part of the features

  // what half of a point stands for: one feature with a panel of values, a panel of features with a weight, or nothing
  struct Half {
    int64_t feature = -1, panel = -1;
    bool empty() const { return feature < 0; }
    bool weight() const { return panel < 0; }
  };
  // what its rows are products of: those of keys, and those that come back to queries
  Factors<T> keyed(const FftHead<T>& u, Half half) const {
    if (half.empty()) return {zero, 0, zero, 0};
    if (half.weight()) return {one, 0, u.k.vector(half.feature / W), W};
    return {u.k.column(half.feature), W, u.v.vector(half.panel), W};
  }
  Factors<T> queried(const FftHead<T>& u, Half half) const {
    if (half.empty()) return {zero, 0, zero, 0};
    if (half.weight()) return {u.down, 1, u.q.vector(half.feature / W), W};
    return {u.q.column(half.feature), W, u.g.vector(half.panel), W};
  }
  void part(int worker, int64_t slot, int64_t index) {
    const FftHead<T>& u = heads[slot];
    int64_t begin = index * part_features, end = std::min(begin + part_features, M), panels = padded<T>(E) / W;
    int64_t n = backward ? piece.n_k : piece.n_q;
    for (int64_t p = 0; p < panels; ++p) std::fill_n(u.values.vector(index * panels + p), padded<T>(n) * W, T(0));
    if (backward) {
      int64_t features = padded<T>(end) - begin;
      std::fill_n(u.dq + begin * u.q.pitch, features * u.q.pitch, T(0));
      std::fill_n(u.dk + begin * u.k.pitch, features * u.k.pitch, T(0));
      std::fill_n(u.correlation + 2 * index * transform.length(), 2 * transform.length(), 0.0);
    } else {
      std::fill_n(u.weights.vector(index), padded<T>(n) * W, T(0));
    }
    auto meet = [&](Half re, Half im) {
      if constexpr (backward) pull(worker, slot, index, re, im);
      else push(worker, slot, index, re, im);
    };
    for (int64_t p = 0; p + 1 < panels; p += 2)
      for (int64_t f = begin; f < end; ++f) meet({f, p}, {f, p + 1});
    for (int64_t f = begin; panels % 2 && f < end; f += 2)
      meet({f, panels - 1}, f + 1 < end ? Half{f + 1, panels - 1} : Half{});
    for (int64_t f = begin; f < end; f += 2 * W) meet({f, -1}, f + W < end ? Half{f + W, -1} : Half{});
  }
  void push(int worker, int64_t slot, int64_t index, Half re, Half im) {
    const FftHead<T>& u = heads[slot];
    T* const only[1] = {reinterpret_cast<T*>(buffer(worker, 0))};
    Factors<T> a = keyed(u, re), b = keyed(u, im);
    auto contracted = [&](Half half) {
      if (half.weight()) return Factors<T>{one, 0, u.q.vector(half.feature / W), W};
      return Factors<T>{u.q.column(half.feature), W, one, 0};
    };
    int64_t first_panel = index * (padded<T>(E) / W), n_q = piece.n_q, n_k = piece.n_k;
    Factors<T> qa = contracted(re), qb = im.empty() ? qa : contracted(im);
    T *to = re.weight() ? u.weights.vector(index) : u.values.vector(first_panel + re.panel);
    T *to_im = im.empty() ? nullptr : im.weight() ? to : u.values.vector(first_panel + im.panel);
    auto get = [&](auto, int64_t i) { return i < n_k ? Point<T>{a(i), b(i)} : Point<T>{}; };
    auto put = [&](auto, int64_t i, Point<T> sum_) {
      if (i >= n_q) return;
      store(to + i * W, fma(qa(i), sum_.re, load(to + i * W)));
      if (to_im) store(to_im + i * W, fma(qb(i), sum_.im, load(to_im + i * W)));
    };
    const T* spectrum = own_spectrum(first_head + slot);
    transform.template convolve<1>(only, get, put, [&](int64_t first, int64_t count) {
      for (int64_t p = first; p < first + count; ++p) {
        T* at = only[0] + p * transform.point;
        store_point(at, times<false>(load_point(at), spectrum[2 * p], spectrum[2 * p + 1]));
      }
    });
  }

  // f(i) of every token, a vector: the sums over its lanes are added to to[i]
  template <class F>
  static void add_sums(int64_t n, T* to, F&& f) {
    for (int64_t i = 0; i < n; i += W) {
      V<T> lanes[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) lanes[r] = f(i + r);
      store(to + i, load(to + i) + sum_of_lanes(lanes));
    }
  }
  static V<T> sum_of_lanes(V<T> (&lanes)[W]) {
    transpose_square<T>(lanes);
#pragma GCC unroll 16
    for (int n = W / 2; n > 0; n /= 2)
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) lanes[r] += lanes[r + n];
    return lanes[0];
  }
  // the lanes themselves, each to a row of its own
  template <class F>
  static void add_lanes(int64_t n, T* to, int64_t pitch, F&& f) {
    for (int64_t i = 0; i < n; i += W) {
      V<T> lanes[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) lanes[r] = f(i + r);
      transpose_square<T>(lanes);
      for (int r = 0; r < W; ++r) store(to + r * pitch + i, load(to + r * pitch + i) + lanes[r]);
    }
  }
  void pull(int worker, int64_t slot, int64_t index, Half re, Half im) {
    const FftHead<T>& u = heads[slot];
    T* const both[2] = {reinterpret_cast<T*>(buffer(worker, 0)), reinterpret_cast<T*>(buffer(worker, 1))};
    Factors<T> a = keyed(u, re), b = keyed(u, im), pa = queried(u, re), pb = queried(u, im);
    int64_t n_q = piece.n_q, n_k = piece.n_k;
    auto get = [&](auto which, int64_t i) {
      if constexpr (decltype(which)::value == 0) return i < n_k ? Point<T>{a(i), b(i)} : Point<T>{};
      else return i < n_q ? Point<T>{pa(i), pb(i)} : Point<T>{};
    };
    auto put = [&](auto which, int64_t i, Point<T> sum_) {
      if (i < (decltype(which)::value == 0 ? n_q : n_k)) store_point(both[which] + i * transform.point, sum_);
    };
    const T* spectrum = own_spectrum(first_head + slot);
    double* correlation = u.correlation + 2 * index * transform.length();
    transform.template convolve<2>(both, get, put, [&](int64_t first, int64_t count) {
      // what comes back from the product of two points: sum_i P_i A_(i-s) of a shift s is the derivative of its factor
      auto one_point = [&](int64_t p, V<T>& r, V<T>& i) {
        T *at = both[0] + p * transform.point, *back = both[1] + p * transform.point;
        Point<T> own = load_point(at), other = load_point(back);
        r = other.re * own.re + other.im * own.im, i = other.im * own.re - other.re * own.im;
        store_point(at, times<false>(own, spectrum[2 * p], spectrum[2 * p + 1]));
        store_point(back, times<true>(other, spectrum[2 * p], spectrum[2 * p + 1]));
      };
      int64_t p = first, end = first + count;
      for (; p + W <= end; p += W) {
        V<T> r[W], i[W];
        for (int n = 0; n < W; ++n) one_point(p + n, r[n], i[n]);
        V<T> real = sum_of_lanes(r), imaginary = sum_of_lanes(i);
        for (int n = 0; n < W; ++n)
          correlation[2 * (p + n)] += static_cast<double>(real[n]), correlation[2 * (p + n) + 1] += static_cast<double>(imaginary[n]);
      }
      for (; p < end; ++p) {
        V<T> r, i;
        one_point(p, r, i);
        correlation[2 * p] += static_cast<double>(sum<T>(r)), correlation[2 * p + 1] += static_cast<double>(sum<T>(i));
      }
    });
    if (re.feature == im.feature && !re.weight()) contract<true>(u, index, re, im, both);
    else {
      contract<false>(u, index, re, im, both);
      T* const shifted[2] = {both[0] + W, both[1] + W};
      if (!im.empty()) contract<false>(u, index, im, re, shifted);
    }
  }
  // the gradients that one half brings, or with `two` both halves of one feature
  template <bool two>
  void contract(const FftHead<T>& u, int64_t index, Half half, Half other, T* const (&both)[2]) const {
    constexpr int64_t point = Transform<T>::point;
    const T *y_ = both[0], *back = both[1];
    T *dq = u.dq + half.feature * u.q.pitch, *dk = u.dk + half.feature * u.k.pitch;
    if (half.weight()) {
      add_lanes(piece.n_q, dq, u.q.pitch, [&](int64_t i) { return broadcast(u.down[i]) * load(y_ + i * point); });
      add_lanes(piece.n_k, dk, u.k.pitch, [&](int64_t j) { return load(back + j * point); });
      return;
    }
    const T *g = u.g.vector(half.panel), *v = u.v.vector(half.panel), *k = u.k.column(half.feature);
    const T *g2 = two ? u.g.vector(other.panel) : nullptr, *v2 = two ? u.v.vector(other.panel) : nullptr;
    int64_t first_panel = index * (padded<T>(E) / W);
    T *dv = u.values.vector(first_panel + half.panel), *dv2 = two ? u.values.vector(first_panel + other.panel) : nullptr;
    add_sums(piece.n_q, dq, [&](int64_t i) {
      V<T> total = load(g + i * W) * load(y_ + i * point);
      return two ? fma(load(g2 + i * W), load(y_ + i * point + W), total) : total;
    });
    add_sums(piece.n_k, dk, [&](int64_t j) {
      V<T> from = load(back + j * point), factor = broadcast(k[j * W]), total = load(v + j * W) * from;
      store(dv + j * W, fma(factor, from, load(dv + j * W)));
      if (!two) return total;
      from = load(back + j * point + W);
      store(dv2 + j * W, fma(factor, from, load(dv2 + j * W)));
      return fma(load(v2 + j * W), from, total);
    });
  }

  // ---- results

  void give_back(int worker, int64_t slot, int64_t which) {
    const FftHead<T>& u = heads[slot];
    int64_t h = first_head + slot, begin = which * block, panels = padded<T>(E) / W;
    T *row = row_of(worker), *square = row + round_up(std::max(M, E) + W, W);
    // the sum over parts, in order
    auto value_row = [&](int64_t i, V<T> factor) {
      for (int64_t p = 0; p < panels; ++p) {
        V<T> total{};
        for (int64_t part = 0; part < parts; ++part) total += load(u.values.vector(part * panels + p, i));
        store(row + p * W, total * factor);
      }
    };
    auto at = [&](const View& to, int64_t i) { return piece.b * to.stride[0] + h * to.stride[1] + i * to.stride[2]; };
    if constexpr (!backward) {
      for (int64_t i = begin; i < std::min(begin + block, piece.n_q); ++i) {
        T z = 0;
        bool sees = seen[h * piece.n_q + i];
        for (int64_t part = 0; part < parts && sees; ++part) z += sum<T>(load(u.weights.vector(part, i)));
        value_row(i, broadcast(!x.normalize ? T(1) : z == T(0) ? T(0) : 1 / z));
        if (!sees) std::fill_n(row, padded<T>(E), T(0));
        y->normalizer.template as<T>()[(piece.b * Hq + h) * x.q.size[2] + piece.first_q + i] = z;
        with_type(y->out.dtype, [&](auto type) {
          using To = decltype(type);
          if constexpr ((sizeof(T) == 8) == (sizeof(To) == 8))
            store_row(row, y->out.template as<To>() + at(y->out, piece.first_q + i), E);
        });
      }
    } else {
      int64_t ld = padded<T>(M);
      auto turn = [&](const T* from, int64_t pitch, int64_t n) {
        transpose(from + begin, pitch, ld, std::min(block, padded<T>(n) - begin), square, ld);
      };
      // several pieces may see one key
      auto add = [&](const View& to, int64_t i, const T* from, int64_t n) {
        T* p = to.template as<T>() + at(to, i);
        for (int64_t c = 0; c < n; ++c) p[c] += from[c];
      };
      if (begin < piece.n_q) turn(u.dq, u.q.pitch, piece.n_q);
      for (int64_t i = begin; i < std::min(begin + block, piece.n_q); ++i)
        add(dy->dq, piece.first_q + i, square + (i - begin) * ld, M);
      if (begin < piece.n_k) turn(u.dk, u.k.pitch, piece.n_k);
      for (int64_t j = begin; j < std::min(begin + block, piece.n_k); ++j) {
        if (padded_key(j)) continue;
        add(dy->dk, piece.first_k + j, square + (j - begin) * ld, M);
        value_row(j, broadcast(T(1)));
        add(dy->dv, piece.first_k + j, row, E);
      }
    }
  }
};

template <class T>
void fft_forward(const ToeplitzProblem& x, const ToeplitzForward& y) {
  ToeplitzFft<T, false> fft(x, &y, nullptr);
  expect(x.workspace.elements() >= fft.workspace(), "workspace is too small");
  fft.run();
}
template <class T>
void fft_backward(const ToeplitzProblem& x, const ToeplitzBackward& y) {
  expect_dtype(y.dv, "dv", std::is_same_v<T, double> ? DType::f64 : DType::f32);
  ToeplitzFft<T, true> fft(x, nullptr, &y);
  expect(x.workspace.elements() >= fft.workspace(), "workspace is too small");
  fft.run();
}
template <class T>
int64_t fft_workspace(const ToeplitzProblem& x, bool backward) {
  if (backward) return ToeplitzFft<T, true>(x, nullptr, nullptr).workspace();
  return ToeplitzFft<T, false>(x, nullptr, nullptr).workspace();
}

#define LONGATTN_FFT(T)                                                         \
  template void fft_forward<T>(const ToeplitzProblem&, const ToeplitzForward&);   \
  template void fft_backward<T>(const ToeplitzProblem&, const ToeplitzBackward&); \
  template int64_t fft_workspace<T>(const ToeplitzProblem&, bool);
LONGATTN_FFT(float)
LONGATTN_FFT(double)

}  // namespace longattn::LONGATTN_ISA
