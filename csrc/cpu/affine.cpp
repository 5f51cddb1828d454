// out = a b + bias for matrices of any size. Blocks of both factors are copied to where a tile reads them in order: b in
// panels as wide as a tile, a in blocks of rows. Workers share the panels and each take some rows and columns of out; or,
// where the depth is the length of a sequence, each takes a stretch of it. How a sum is cut depends on the depth
// alone, so a row's bits do not depend on the other rows, nor any on the threads.
#include "affine.h"

#include "kernels.h"
#include "parallel.h"
#include "products.h"
#include "rows.h"

namespace longattn::LONGATTN_ISA {

namespace {

// of a block: a panel stays in the first cache, a block of a in the second
constexpr int64_t block_depth = 256, block_rows = 96, group_columns = 512;
// of b that lies packed at one time: elements, and depth; and rows that are copied at once
constexpr int64_t packed_elements = 1 << 20, packed_depth = 2048, slice = 16;
// depth of a worker's stretch
constexpr int64_t stretch = 512;

struct Cut {
  int64_t M, K, N;
  int64_t depth;           // of what is packed at one time
  int64_t rows, columns;   // of a task

  Cut(const Affine& x, bool direct, int panel) : M(x.a.size[0]), K(x.a.size[1]), N(x.b.size[1]) {
    depth = x.split ? block_depth : round_up(std::max<int64_t>(K, 1), block_depth);
    // what is summed elsewhere than in `out` cannot wait there for the rest of the depth
    if (direct && !x.split) {
      int64_t fits = packed_elements / std::max<int64_t>(N, 1) / block_depth * block_depth;
      depth = std::min(depth, std::clamp(fits, block_depth, packed_depth));
    }
    // a task for each thread, in blocks that are not too low and groups that are not too narrow to pay for the copies
    int64_t threads = x.split ? 1 : x.threads, blocks = std::max<int64_t>((M + block_rows - 1) / block_rows, 1);
    int64_t groups = std::max((N + group_columns - 1) / group_columns, (threads + blocks - 1) / blocks);
    columns = std::max(round_up((N + groups - 1) / groups, panel), std::min<int64_t>(4 * panel, round_up(N, panel)));
    groups = (N + columns - 1) / columns;
    if (blocks * groups < 4 * threads) blocks = round_up(blocks * groups, threads) / groups;
    blocks = std::clamp<int64_t>(blocks, 1, std::max<int64_t>(M / (4 * tile_rows), 1));
    rows = round_up((M + blocks - 1) / blocks, tile_rows);
  }
};

// A is T, or Pair for two bfloat16
template <class T, class A>
struct Product {
  static constexpr int64_t panel = tile_vectors * width<T>;

  struct Worker {
    Matrix<A> a, panels;
    Matrix<T> raw, turned, sums;
    int64_t bytes;
    Worker(char* memory, const Cut& cut, bool split) {
      Arena<T> arena{memory};
      a = arena.template take<A>(cut.rows, block_depth);
      raw = arena.take(std::max(cut.rows, panel), block_depth);
      turned = arena.take(panel, block_depth);
      if (split) panels = take_panels(arena, cut);
      else sums = arena.take(cut.rows, cut.columns + panel);
      bytes = arena.bytes;
    }
  };
  static Matrix<A> take_panels(Arena<T>& arena, const Cut& cut) {
    return arena.template take<A>((cut.N + panel - 1) / panel, panel * cut.depth / per<A>);
  }
  struct Shared {
    Matrix<A> panels;
    Matrix<T> parts;  // the sums of one stretch for each worker
    T* bias;
    int64_t bytes;
    Shared(char* memory, const Cut& cut, const Affine& x) {
      Arena<T> arena{memory};
      int64_t columns = round_up(cut.N, panel);
      if (x.split) parts = arena.take(x.threads * cut.M, columns);
      else panels = take_panels(arena, cut);
      bias = arena.take(1, columns).p;
      bytes = arena.bytes;
    }
  };

  const Affine& x;
  bool direct;  // whether sums are formed in `out`
  Cut cut;
  Shared shared;

  explicit Product(const Affine& x)
      : x(x), direct(x.out.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32)), cut(x, direct, panel),
        shared(first_line(x.workspace.data), cut, x) {}
  int64_t workspace() const { return 64 + shared.bytes + x.threads * Worker(nullptr, cut, x.split).bytes; }
  Worker worker(int i) const {
    char* memory = first_line(x.workspace.data) + shared.bytes;
    Worker w(memory + i * Worker(nullptr, cut, x.split).bytes, cut, x.split);
    if (!x.split) w.panels = shared.panels;
    return w;
  }
  static A* panel_at(const Worker& w, int64_t p, int64_t k) { return w.panels.row(p) + k / per<A> * panel; }

  // whether b lies along the depth
  bool turned() const { return std::abs(x.b.stride[1]) > std::abs(x.b.stride[0]); }
  // depth k of the packed panels, from row begin + k of b on
  template <class From>
  void pack_across(const Worker& w, int64_t begin, int64_t k, int64_t depth) const {
    for (int64_t i = 0; i < depth; i += per<A>)
      for (int64_t p = 0, column = 0; column < cut.N; ++p, column += panel) {
        int64_t count = std::min(panel, cut.N - column), lines = std::min(per<A>, depth - i);
        Matrix<T> to{std::is_same_v<A, T> ? reinterpret_cast<T*>(panel_at(w, p, k + i)) : w.raw.p, panel};
        __builtin_prefetch(panel_at(w, p, k + i + 8 * per<A>), 1);
        for (int64_t j = 0; j < lines; ++j) {
          const From* from = x.b.as<From>() + (begin + k + i + j) * x.b.stride[0] + column * x.b.stride[1];
          load_row<T>(from, x.b.stride[1], count, to.row(j));
          for (int64_t c = padded<T>(count); c < panel; c += width<T>) store(to.row(j) + c, V<T>{});
        }
        if constexpr (!std::is_same_v<A, T>) pair_across(lines, panel, to, Matrix<A>{panel_at(w, p, k + i), panel});
      }
  }
  // the same of one panel, where b is turned
  template <class From>
  void pack_along(const Worker& w, int64_t p, int64_t begin, int64_t k, int64_t depth) const {
    for (int64_t j = 0, column = p * panel; j < panel; ++j, ++column) {
      const From* from = x.b.as<From>() + (begin + k) * x.b.stride[0] + column * x.b.stride[1];
      if (column < cut.N) load_row<T>(from, x.b.stride[0], depth, w.turned.row(j));
      else std::fill_n(w.turned.row(j), padded<T>(depth), T(0));
    }
    Matrix<T> to{std::is_same_v<A, T> ? reinterpret_cast<T*>(panel_at(w, p, k)) : w.raw.p, panel};
    transpose(w.turned.p, w.turned.ld, panel, depth, to.p, panel);
    if constexpr (!std::is_same_v<A, T>) pair_across(depth, panel, to, Matrix<A>{panel_at(w, p, k), panel});
  }
  template <class From>
  void pack(int64_t begin, int64_t end) const {
    int64_t depth = turned() ? block_depth : slice, slices = (end - begin + depth - 1) / depth;
    parallel_tasks(turned() ? slices * ((cut.N + panel - 1) / panel) : slices, x.threads, [&](int64_t task, int me) {
      int64_t k = task % slices * depth, rows = std::min(depth, end - begin - k);
      if (turned()) pack_along<From>(worker(me), task / slices, begin, k, rows);
      else pack_across<From>(worker(me), begin, k, rows);
    });
  }

  // a block of a as it lies in memory: rows along the depth, or else panels as high as a tile
  bool along() const { return std::abs(x.a.stride[1]) <= std::abs(x.a.stride[0]); }
  template <class From>
  Matrix<A> pack_rows(const Worker& w, int64_t row, int64_t rows, int64_t k, int64_t depth) const {
    int64_t down = x.a.stride[0], across = x.a.stride[1];
    const From* from = x.a.as<From>() + row * down + k * across;
    if (along()) {
      Matrix<A> a{w.a.p, leading<A>(block_depth)};
      Matrix<T> to{w.raw.p, leading<T>(block_depth)};
      if constexpr (std::is_same_v<A, T>) to = a;
      for (int64_t i = 0; i < rows; ++i) load_row<T>(from + i * down, across, depth, to.row(i));
      if constexpr (!std::is_same_v<A, T>) pair_along(rows, depth, to, a);
      return a;
    }
    for (int64_t i = 0; i < depth; i += per<A>) {
      Matrix<T> line{w.raw.p, leading<T>(padded<T>(cut.rows))};
      Matrix<A> a{reinterpret_cast<A*>(w.turned.p), 0};
      int64_t lines = std::min(per<A>, depth - i);
      // pieces of rows are too short for the machine to foresee the next
      for (int64_t r = 0; down == 1 && r < rows; r += 64 / sizeof(From)) __builtin_prefetch(from + (i + 8) * across + r);
      for (int64_t j = 0; j < lines; ++j) load_row<T>(from + (i + j) * across, down, rows, line.row(j));
      if constexpr (std::is_same_v<A, T>) a = line;
      else pair_across(lines, rows, line, a);
      A* to = w.a.p + i / per<A> * tile_rows;
      for (int64_t r = 0; r < rows; r += tile_rows, to += block_depth / per<A> * tile_rows)
        std::memcpy(static_cast<void*>(to), a.p + r, tile_rows * sizeof(A));
    }
    return {w.a.p, block_depth / per<A>};
  }

  // what the sums of a panel are formed in
  Matrix<T> sums_at(const Worker& w, int64_t row, int64_t p, int64_t first) const {
    bool whole = direct && (p + 1) * panel <= cut.N;
    if (whole) return {x.out.as<T>() + row * x.out.stride[0] + p * panel, x.out.stride[0]};
    return {w.sums.p + (p * panel - first), w.sums.ld};
  }

  // sums of rows x columns over the depth from k on, onto what is there
  template <class From, class At>
  void block(const Worker& w, int64_t row, int64_t first, int64_t k, int64_t depth, int64_t packed, bool add, At&& at) const {
    int64_t rows = std::min(cut.rows, cut.M - row), past = std::min(first + cut.columns, cut.N);
    Matrix<A> a = pack_rows<From>(w, row, rows, k, depth);
    int64_t steps = (depth + per<A> - 1) / per<A>;
    bool last = k + depth == cut.K && x.bias;
    for (int64_t p = first / panel; p * panel < past; ++p) {
      Matrix<T> sums = at(p);
      const A* b = panel_at(w, p, packed);
      for (int64_t r = 0; r < rows; r += tile_rows)
        with_rows<tile_rows>(rows - r, [&](auto R) {
          Tile<T, R, tile_vectors> tile;
          tile.zero();
          if (along()) tile.multiply_add(a.row(r), a.ld, b, panel, steps);
          else tile.multiply_add_transposed(a.row(r), tile_rows, b, panel, steps);
          if (add) tile.add(sums.row(r), sums.ld);
          if (last) tile.add(shared.bias + p * panel, 0);
          tile.store_to(sums.row(r), sums.ld);
        });
    }
  }

  // one task: rows x columns of out, over the depth that is packed
  template <class From>
  void task(const Worker& w, int64_t row, int64_t first, int64_t begin, int64_t end) const {
    if (begin > 0) exchange_edges<From>(w, row, first, false);
    for (int64_t k = begin; k < end; k += block_depth)
      block<From>(w, row, first, k, std::min(block_depth, end - k), k - begin, k > 0,
                  [&](int64_t p) { return sums_at(w, row, p, first); });
    exchange_edges<From>(w, row, first, true);
  }
  // between `out` and the sums that are not formed there
  template <class From>
  void exchange_edges(const Worker& w, int64_t row, int64_t first, bool out) const {
    int64_t rows = std::min(cut.rows, cut.M - row), past = std::min(first + cut.columns, cut.N);
    for (int64_t p = first / panel; p * panel < past; ++p) {
      Matrix<T> sums = sums_at(w, row, p, first);
      int64_t count = std::min(panel, cut.N - p * panel), at = row * x.out.stride[0] + p * panel;
      if (direct && count == panel) continue;
      for (int64_t r = 0; r < rows; ++r) {
        if (!direct) store_row(sums.row(r), x.out.as<From>() + at + r * x.out.stride[0], count);
        else if (out) store_row(sums.row(r), x.out.as<T>() + at + r * x.out.stride[0], count);
        else load_row<T>(x.out.as<T>() + at + r * x.out.stride[0], 1, count, sums.row(r));
      }
    }
  }
  template <class From>
  void run() const {
    int64_t groups = (cut.N + cut.columns - 1) / cut.columns;
    for (int64_t begin = 0; begin < cut.K; begin += cut.depth) {
      int64_t end = std::min(begin + cut.depth, cut.K);
      pack<From>(begin, end);
      parallel_tasks((cut.M + cut.rows - 1) / cut.rows * groups, x.threads, [&](int64_t i, int me) {
        task<From>(worker(me), i / groups * cut.rows, i % groups * cut.columns, begin, end);
      });
    }
  }

  // the sums over one stretch, by one worker
  template <class From>
  void sum_stretch(const Worker& w, int64_t begin, Matrix<T> sums) const {
    for (int64_t k = begin, end = std::min(begin + stretch, cut.K); k < end; k += block_depth) {
      int64_t depth = std::min(block_depth, end - k);
      if (!turned()) pack_across<From>(w, k, 0, depth);
      for (int64_t p = 0; turned() && p * panel < cut.N; ++p) pack_along<From>(w, p, k, 0, depth);
      for (int64_t row = 0; row < cut.M; row += cut.rows)
        for (int64_t first = 0; first < cut.N; first += cut.columns)
          block<From>(w, row, first, k, depth, 0, k > begin, [&](int64_t p) {
            return Matrix<T>{sums.row(row) + p * panel, sums.ld};
          });
    }
  }
  template <class From>
  void run_split() const {
    int64_t stretches = (cut.K + stretch - 1) / stretch;
    for (int64_t first = 0; first < stretches; first += x.threads) {
      int64_t now = std::min<int64_t>(x.threads, stretches - first);
      auto part = [&](int64_t i) { return Matrix<T>{shared.parts.row(i * cut.M), shared.parts.ld}; };
      parallel_tasks(now, x.threads, [&](int64_t i, int me) {
        sum_stretch<From>(worker(me), (first + i) * stretch, part(i));
      });
      parallel_tasks(cut.M, x.threads, [&](int64_t row, int) {
        T *out = x.out.as<T>() + row * x.out.stride[0], *sum = part(0).row(row);
        for (int64_t n = 0; n < cut.N; ++n) {
          T total = first ? out[n] : T(0);
          for (int64_t i = 0; i < now; ++i) total += sum[i * cut.M * shared.parts.ld + n];
          out[n] = total;
        }
      });
    }
  }
};

// f with the Product of these dtypes
template <class F>
void with_product(const Affine& x, F&& f) {
  with_type(x.a.dtype, [&](auto from) {
    using From = decltype(from);
    if constexpr (std::is_same_v<From, double>) f(Product<double, double>(x), from);
    else if constexpr (std::is_same_v<From, bf16> && has_pairs) f(Product<float, Pair>(x), from);
    else f(Product<float, float>(x), from);
  });
}

}  // namespace

int64_t affine_workspace(const Affine& x) {
  int64_t bytes = 0;
  expect(x.a.rank == 2 && x.b.rank == 2 && x.threads >= 1, "a must be [M, K] and b [K, N], and threads positive");
  if (x.a.size[0] == 0 || x.b.size[1] == 0) return bytes;
  with_product(x, [&](const auto& product, auto) { bytes = product.workspace(); });
  return bytes;
}

void affine(const Affine& x) {
  expect(x.a.rank == 2 && x.b.rank == 2 && x.a.size[1] == x.b.size[0], "a must be [M, K] and b [K, N]");
  int64_t M = x.a.size[0], K = x.a.size[1], N = x.b.size[1];
  expect(x.a.dtype <= DType::f16, "a must be floating point");
  expect_dtype(x.b, "b", x.a.dtype), expect_shape(x.out, "out", {M, N});
  if (x.bias) expect_shape(x.bias, "bias", {N}), expect_dtype(x.bias, "bias", x.a.dtype);
  bool summed = x.out.dtype == (x.a.dtype == DType::f64 ? DType::f64 : DType::f32);
  expect(summed || x.out.dtype == x.a.dtype, "out must have the dtype of a, or what it is summed in");
  expect(N < 2 || x.out.stride[1] == 1, "rows of out must be contiguous");
  if (M == 0 || N == 0) return;
  expect(K > 0, "a must have columns");
  expect(x.workspace.rank == 1 && x.workspace.size[0] >= affine_workspace(x), "the workspace is too small");
  expect(!x.split || (summed && !x.bias), "a split depth is summed in out, without a bias");
  with_product(x, [&](const auto& product, auto from) {
    using From = decltype(from);
    if (x.split) return product.template run_split<From>();
    if (x.bias) load_row(x.bias.as<From>(), x.bias.stride[0], N, product.shared.bias);
    product.template run<From>();
  });
}

}  // namespace longattn::LONGATTN_ISA
