// The module longattn._C: one line for each entry point. Tensors cross as (pointer, dtype, sizes, strides).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.h"

#if defined(LONGATTN_WITH_CUDA)
#include "cuda/linear.h"
#include "cuda/lsh.h"
#include "cuda/reversible.h"
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;
using namespace longattn;

namespace {

// None is the empty view
View view(const py::handle& x) {
  View v;
  if (x.is_none()) return v;
  auto fields = py::cast<py::tuple>(x);
  py::sequence sizes = fields[2], strides = fields[3];
  v.data = reinterpret_cast<char*>(fields[0].cast<uintptr_t>());
  v.dtype = static_cast<DType>(fields[1].cast<int>());
  v.rank = static_cast<int>(sizes.size());
  expect(v.rank <= View::max_rank && strides.size() == sizes.size(), "a tensor has more than 6 dimensions");
  for (int i = 0; i < v.rank; ++i) v.size[i] = sizes[i].cast<int64_t>(), v.stride[i] = strides[i].cast<int64_t>();
  v.elements();
  return v;
}

// a dictionary of named views; a name that is not there is an empty view
struct Views {
  py::dict fields;
  View operator()(const char* name) const {
    py::object x = fields.attr("get")(name);
    return view(x);
  }
  StateSlots slots(const std::string& prefix) const {
    return {(*this)((prefix + "_kv").c_str()), (*this)((prefix + "_k_sum").c_str()),
            (*this)((prefix + "_log_scale").c_str())};
  }
};

// an empty projection where there is none
FavorMap favor_map(const py::dict& fields) {
  Views get{fields};
  FavorMap map;
  map.projection = get("projection"), map.mean = get("mean");
  if (!map.projection) return map;
  map.kind = fields["kind"].cast<int>(), map.root = fields["root"].cast<double>(), map.l2 = fields["l2"].cast<bool>();
  map.exact_diagonal = fields.contains("exact_diagonal") && fields["exact_diagonal"].cast<bool>();
  return map;
}

Affine affine_problem(const py::dict& fields, bool split, int threads) {
  Views get{fields};
  return {get("a"), get("b"), get("bias"), get("out"), get("workspace"), split, threads};
}

void affine(const py::dict& fields, bool split, int threads) {
  Affine x = affine_problem(fields, split, threads);
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  kernels.affine(x);
}

LinearProblem linear_problem(const py::dict& fields) {
  Views get{fields};
  LinearProblem x;
  x.q = get("q"), x.k = get("k"), x.v = get("v"), x.mask = get("mask"), x.cu_seqlens = get("cu_seqlens");
  x.kv = get("kv"), x.k_sum = get("k_sum"), x.workspace = get("workspace");
  x.log_scale = get("log_scale");
  x.favor = favor_map(fields);
  x.feature = fields["feature"].cast<int>(), x.is_causal = fields["is_causal"].cast<bool>();
  x.normalize = fields["normalize"].cast<bool>(), x.scale = fields["scale"].cast<double>();
  x.segment = fields["segment"].cast<int64_t>(), x.split = fields["split"].cast<bool>();
  x.threads = fields["threads"].cast<int>();
  return x;
}

void linear_forward(const py::dict& problem, const py::dict& results) {
  LinearProblem x = linear_problem(problem);
  Views get{results};
  LinearForward y;
  y.out = get("out"), y.normalizer = get("normalizer"), y.row_scale = get("row_scale");
  y.kv = get("kv"), y.k_sum = get("k_sum"), y.log_scale = get("log_scale");
  y.segment = get.slots("segment"), y.partial = get.slots("partial");
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  (x.favor.projection ? kernels.favor_forward : kernels.linear_forward)(x, y);
}

void linear_backward(const py::dict& problem, const py::dict& results) {
  LinearProblem x = linear_problem(problem);
  Views get{results};
  LinearBackward y;
  y.grad_out = get("grad_out"), y.grad_kv = get("grad_kv"), y.grad_k_sum = get("grad_k_sum");
  y.out = get("out"), y.normalizer = get("normalizer"), y.row_scale = get("row_scale");
  y.segment = get.slots("segment"), y.partial = get.slots("partial"), y.final_log_scale = get("final_log_scale");
  y.dq = get("dq"), y.dk = get("dk"), y.dv = get("dv"), y.dkv = get("dkv"), y.dk_sum = get("dk_sum");
  y.dkv_scale = get("dkv_scale"), y.root_q = get("root_q"), y.root_k = get("root_k"), y.droot = get("droot");
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  (x.favor.projection ? kernels.favor_backward : kernels.linear_backward)(x, y);
}

FeaturesProblem features_problem(const py::dict& fields) {
  Views get{fields};
  FeaturesProblem x;
  x.x = get("x"), x.favor = favor_map(fields), x.workspace = get("workspace");
  x.shift = fields["shift"].cast<double>(), x.logs = fields["logs"].cast<bool>();
  x.threads = fields["threads"].cast<int>();
  return x;
}

void features_forward(const py::dict& problem, const py::dict& results) {
  FeaturesProblem x = features_problem(problem);
  View phi = Views{results}("phi");
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  kernels.features_forward(x, phi);
}

void features_backward(const py::dict& problem, const py::dict& results) {
  FeaturesProblem x = features_problem(problem);
  Views get{results};
  FeaturesBackward y{get("grad"), get("phi"), get("dx"), get("root_rows")};
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  kernels.features_backward(x, y);
}

SoftmaxProblem softmax_problem(const py::dict& fields) {
  Views get{fields};
  SoftmaxProblem x;
  x.q = get("q"), x.k = get("k"), x.v = get("v"), x.mask = get("mask"), x.cu_seqlens = get("cu_seqlens");
  x.key_scale = get("key_scale"), x.order_q = get("order_q"), x.order_k = get("order_k");
  x.bias = get("bias"), x.rank_q = get("rank_q"), x.rank_k = get("rank_k"), x.bucket_q = get("bucket_q"), x.bucket_k = get("bucket_k");
  x.chunk = fields["chunk"].cast<int64_t>(), x.look_back = fields["look_back"].cast<int64_t>();
  x.look_ahead = fields["look_ahead"].cast<int64_t>(), x.window = fields["window"].cast<int64_t>();
  x.is_causal = fields["is_causal"].cast<bool>();
  x.dedupe = fields["dedupe"].cast<bool>(), x.wrap = fields["wrap"].cast<bool>();
  x.self = static_cast<SelfRule>(fields["self_rule"].cast<int>()), x.scale = fields["scale"].cast<double>();
  x.dropout_p = fields["dropout_p"].cast<double>(), x.seed = fields["seed"].cast<uint64_t>();
  x.threads = fields["threads"].cast<int>(), x.workspace = get("workspace");
  return x;
}

void softmax_forward(const py::dict& problem, const py::dict& results) {
  SoftmaxProblem x = softmax_problem(problem);
  Views get{results};
  SoftmaxForward y{get("out"), get("lse"), get("top")};
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  kernels.softmax_forward(x, y);
}

void softmax_backward(const py::dict& problem, const py::dict& results) {
  SoftmaxProblem x = softmax_problem(problem);
  Views get{results};
  SoftmaxBackward y{get("grad_out"), get("out"), get("lse"), get("delta"), get("dq"), get("dk"), get("dv"), get("dbias")};
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  kernels.softmax_backward(x, y);
}

ToeplitzProblem toeplitz_problem(const py::dict& fields) {
  Views get{fields};
  ToeplitzProblem x;
  x.q = get("q"), x.k = get("k"), x.v = get("v"), x.c = get("c"), x.mask = get("mask");
  x.cu_seqlens = get("cu_seqlens"), x.workspace = get("workspace");
  x.reach = fields["reach"].cast<int64_t>(), x.offset = fields["offset"].cast<int64_t>();
  x.is_causal = fields["is_causal"].cast<bool>(), x.normalize = fields["normalize"].cast<bool>();
  x.fft = fields["fft"].cast<bool>(), x.threads = fields["threads"].cast<int>();
  return x;
}

void toeplitz_forward(const py::dict& problem, const py::dict& results) {
  ToeplitzProblem x = toeplitz_problem(problem);
  Views get{results};
  ToeplitzForward y{get("out"), get("normalizer")};
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  kernels.toeplitz_forward(x, y);
}

void toeplitz_backward(const py::dict& problem, const py::dict& results) {
  ToeplitzProblem x = toeplitz_problem(problem);
  Views get{results};
  ToeplitzBackward y;
  y.grad_out = get("grad_out"), y.grad_normalizer = get("grad_normalizer"), y.out = get("out");
  y.normalizer = get("normalizer"), y.rows = get("rows");
  y.dq = get("dq"), y.dk = get("dk"), y.dv = get("dv"), y.dc = get("dc");
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  kernels.toeplitz_backward(x, y);
}

// a tensor without gaps, of which the caller says how large it is
View dense(uintptr_t address, DType dtype, std::initializer_list<int64_t> sizes) {
  View v;
  v.data = reinterpret_cast<char*>(address), v.dtype = dtype, v.rank = static_cast<int>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), v.size);
  int64_t elements = 1;
  for (int i = v.rank - 1; i >= 0; --i) v.stride[i] = elements, elements *= v.size[i];
  return v;
}

// what a step owns or has checked crosses as bare addresses: bias [biases, 2 reach + 1], the state of `held` keys, the next
// one and the output. `scratch(bytes)` gives the workspace, so that one call does
void toeplitz_step(const py::dict& fields, const std::vector<uintptr_t>& at, int64_t biases, int64_t reach, int64_t held,
                   const py::function& scratch) {
  Views get{fields};
  ToeplitzStep x;
  x.q = get("q"), x.k = get("k"), x.v = get("v"), x.favor = favor_map(fields);
  expect(x.q.rank == 4 && x.k.rank == 4 && x.v.rank == 4 && at.size() == 12, "q, k and v must have 4 dimensions");
  DType type = x.q.dtype;
  int64_t B = x.q.size[0], Hq = x.q.size[1], H = x.k.size[1], E = x.v.size[3], M = fields["features"].cast<int64_t>();
  auto ring = [&](size_t i, int64_t t) {
    return RingState{dense(at[i], type, {B, H, M, E}), dense(at[i + 1], type, {B, H, M}), dense(at[i + 2], type, {B, H, t, M}),
                     dense(at[i + 3], type, {B, H, t, E}), dense(at[i + 4], DType::boolean, {B, t})};
  };
  x.bias = dense(at[0], type, {biases, 2 * reach + 1}), x.before = ring(1, held);
  x.after = ring(6, std::min(held + 1, reach)), x.out = dense(at[11], type, {B, Hq, 1, E});
  x.feature = fields["feature"].cast<int>(), x.normalize = fields["normalize"].cast<bool>();
  x.scale = fields["scale"].cast<double>(), x.threads = fields["threads"].cast<int>();
  const Kernels& kernels = active_kernels();
  py::object memory = scratch(kernels.toeplitz_step_workspace(x));
  x.workspace = view(memory);
  py::gil_scoped_release release;
  kernels.toeplitz_step(x);
}

void lsh_hash(const py::dict& fields, const std::vector<int64_t>& factors, int threads) {
  Views get{fields};
  LshHash x{get("x"), get("extra"), get("rotations"), factors, threads, get("buckets"), get("workspace")};
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  kernels.lsh_hash(x);
}

void lsh_sort(const py::dict& fields, int64_t n_keys, int64_t chunk, int threads) {
  Views get{fields};
  LshSort x{get("keys"), get("cu_seqlens"), n_keys, chunk, threads, get("order"), get("rank"), get("workspace")};
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  kernels.lsh_sort(x);
}

bool reversible_add(const py::dict& fields, double grid, double limit, bool subtract, int threads) {
  Views get{fields};
  ReversibleAdd x{get("x"), get("f"), get("out"), grid, limit, subtract, threads};
  const Kernels& kernels = active_kernels();
  py::gil_scoped_release release;
  return kernels.reversible_add(x);
}

#if defined(LONGATTN_WITH_CUDA)
void launched(int error, const char* what) {
  if (error) throw std::runtime_error(std::string("longattn: ") + what + " did not launch: " + cuda::error_string(error));
}

void state_scan(const py::dict& fields, int64_t segment, bool reverse, uintptr_t stream) {
  Views get{fields};
  cuda::StateScan x;
  x.kv = get("kv"), x.k_sum = get("k_sum"), x.cu_seqlens = get("cu_seqlens");
  x.initial_kv = get("initial_kv"), x.initial_k_sum = get("initial_k_sum");
  x.final_kv = get("final_kv"), x.final_k_sum = get("final_k_sum");
  x.segment = segment, x.reverse = reverse;
  launched(cuda::state_scan(x, stream), "state_scan");
}

void linear_step(const py::dict& fields, int feature, bool normalize, double scale, uintptr_t stream) {
  Views get{fields};
  cuda::LinearStep x;
  x.q = get("q"), x.k = get("k"), x.v = get("v"), x.mask = get("mask"), x.kv = get("kv"), x.k_sum = get("k_sum");
  x.out = get("out"), x.normalizer = get("normalizer"), x.new_kv = get("new_kv"), x.new_k_sum = get("new_k_sum");
  x.feature = feature, x.normalize = normalize, x.scale = scale;
  launched(cuda::linear_step(x, stream), "linear_step");
}

void lsh_sort_cuda(const py::dict& fields, int64_t n_keys, int64_t chunk, uintptr_t stream) {
  Views get{fields};
  cuda::LshSort x;
  x.keys = get("keys"), x.cu_seqlens = get("cu_seqlens"), x.order = get("order"), x.rank = get("rank");
  x.workspace = get("workspace"), x.n_keys = n_keys, x.chunk = chunk;
  launched(cuda::lsh_sort(x, stream), "lsh_sort");
}

void reversible_add_cuda(const py::dict& fields, double grid, double limit, bool subtract, uintptr_t stream) {
  Views get{fields};
  cuda::ReversibleAdd x{get("x"), get("f"), get("out"), get("flag"), grid, limit, subtract};
  launched(cuda::reversible_add(x, stream), "reversible_add");
}
#endif

// asks for huge pages behind fresh memory: its first touch is several times faster. A hint, which the system may ignore.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  uintptr_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

std::vector<std::string> isas(bool only_supported) {
  std::vector<std::string> names;
  for (const Kernels* k : compiled_kernels())
    if (!only_supported || supported(*k)) names.emplace_back(k->isa);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("isa", [] { return active_kernels().isa; });
  m.def("isas", [] { return isas(false); });
  m.def("supported_isas", [] { return isas(true); });
  m.def("peak_gflops", [](int64_t repeats) { return active_kernels().peak_gflops(repeats); }, py::arg("repeats") = 20000);
#if defined(LONGATTN_WITH_CUDA)
  m.def("cuda_built", [] { return true; });
  m.def("state_scan", state_scan);
  m.def("linear_step", linear_step);
  m.def("lsh_sort_cuda_workspace", cuda::lsh_sort_workspace);
  m.def("lsh_sort_cuda", lsh_sort_cuda);
  m.def("reversible_add_cuda", reversible_add_cuda);
#else
  m.def("cuda_built", [] { return false; });
#endif
  m.def("advise_huge_pages", advise_huge_pages);
  m.def("affine_workspace", [](const py::dict& fields, bool split, int threads) {
    return active_kernels().affine_workspace(affine_problem(fields, split, threads));
  });
  m.def("affine", affine);
  m.def("linear_workspace", [](int64_t D, int64_t E, int64_t M, int64_t P, bool f64, int threads) {
    return active_kernels().linear_workspace(D, E, M, P, f64, threads);
  });
  m.def("linear_forward", linear_forward);
  m.def("linear_backward", linear_backward);
  m.def("features_workspace", [](const py::dict& problem) {
    return active_kernels().features_workspace(features_problem(problem));
  });
  m.def("features_forward", features_forward);
  m.def("features_backward", features_backward);
  m.def("softmax_workspace", [](const py::dict& problem, bool backward) {
    return active_kernels().softmax_workspace(softmax_problem(problem), backward);
  });
  m.def("softmax_forward", softmax_forward);
  m.def("softmax_backward", softmax_backward);
  m.def("toeplitz_workspace", [](const py::dict& problem, bool backward) {
    return active_kernels().toeplitz_workspace(toeplitz_problem(problem), backward);
  });
  m.def("toeplitz_forward", toeplitz_forward);
  m.def("toeplitz_backward", toeplitz_backward);
  m.def("toeplitz_step", toeplitz_step);
  m.def("lsh_workspace", [](int64_t head_dim, int64_t n_keys, int threads) {
    return active_kernels().lsh_workspace(head_dim, n_keys, threads);
  });
  m.def("lsh_hash", lsh_hash);
  m.def("lsh_sort", lsh_sort);
  m.def("reversible_add", reversible_add);
}
