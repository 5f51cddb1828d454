// A tensor as it crosses the boundary: a pointer, a dtype, sizes and strides (in elements). Nothing here owns memory.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace longattn {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, boolean = 4, i32 = 5, u8 = 6 };

struct View {
  static constexpr int max_rank = 6;
  char* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  int64_t size[max_rank] = {};
  int64_t stride[max_rank] = {};

  explicit operator bool() const { return rank > 0; }
  template <class T>
  T* as() const { return reinterpret_cast<T*>(data); }

  int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i)
      if (__builtin_mul_overflow(n, size[i], &n)) throw std::overflow_error("longattn: a tensor has more than 2^63 elements");
    return n;
  }
};

// memory safety rests on these: every size a kernel derives from one view and uses on another is compared first
inline void expect(bool ok, const char* sentence) {
  if (!ok) throw std::invalid_argument(std::string("longattn: ") + sentence);
}

inline void expect_dtype(const View& x, const char* name, DType dtype) {
  if (x.dtype != dtype) throw std::invalid_argument(std::string("longattn: ") + name + " has a dtype that does not fit");
}

inline void expect_shape(const View& x, const char* name, std::initializer_list<int64_t> shape) {
  bool ok = x.rank == static_cast<int>(shape.size());
  int i = 0;
  std::string wanted, came;
  for (int64_t n : shape) {
    ok = ok && x.size[i] == n;
    wanted += (i ? ", " : "") + std::to_string(n);
    ++i;
  }
  for (int d = 0; d < x.rank; ++d) came += (d ? ", " : "") + std::to_string(x.size[d]);
  if (!ok) throw std::invalid_argument(std::string("longattn: ") + name + " must be [" + wanted + "], got [" + came + "]");
}

}  // namespace longattn
