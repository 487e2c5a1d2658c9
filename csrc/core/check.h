// Checks of torch arguments: every message names op, argument, expected and got.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "core/hd.h"

namespace tessella {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Arg {
  const char* op;
  const char* name;
};

// NOTE: plain strings, no std::ostringstream: a libtorch may export its own copies of the stream
// functions, and with torch 2.11+cu130 those crashed here. CMakeLists.txt guards against it too.
inline std::string text(const char* s) { return s; }
inline std::string text(const std::string& s) { return s; }
inline std::string text(int64_t i) { return std::to_string(i); }

template <class E, class G>
[[noreturn]] void refuse(const Arg& arg, const E& expected, const G& got) {
  throw std::runtime_error("tessella::" + text(arg.op) + ": " + arg.name + ": expected " +
                           text(expected) + ", got " + text(got));
}

inline std::string shape_text(const int64_t* sizes, size_t n) {
  std::string shape = "[";
  for (size_t i = 0; i < n; ++i) shape += (i ? ", " : "") + std::to_string(sizes[i]);
  return shape + "]";
}

inline std::string dtype_text(ScalarType t) {
  switch (t) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "dtype " + std::to_string(int(t));
  }
}

inline std::string describe(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return dtype_text(t.scalar_type()) + " " + shape_text(sizes.data(), sizes.size()) +
         (t.is_contiguous() ? "" : ", not contiguous") + (t.is_cuda() ? " on cuda" : " on cpu");
}

// A contiguous tensor of this dtype and shape, on the device of `beside`.
inline void check_tensor(const Arg& arg, const Tensor& t, ScalarType dtype,
                         std::initializer_list<int64_t> shape, const Tensor& beside) {
  bool ok = t.scalar_type() == dtype && t.dim() == int64_t(shape.size()) && t.is_contiguous() &&
            t.device() == beside.device();
  for (size_t i = 0; ok && i < shape.size(); ++i) ok = t.size(int64_t(i)) == shape.begin()[i];
  if (!ok)
    refuse(arg,
           "contiguous " + dtype_text(dtype) + " " + shape_text(shape.begin(), shape.size()) +
               (beside.is_cuda() ? " on cuda" : " on cpu"),
           describe(t));
}

inline DType check_float(const Arg& arg, ScalarType t) {
  if (t == ScalarType::BFloat16) return DType::kBF16;
  if (t == ScalarType::Half) return DType::kF16;
  if (t == ScalarType::Float) return DType::kF32;
  refuse(arg, "bfloat16, float16 or float32", dtype_text(t));
}

// Of a cache's plain numbers.
inline DType check_cached(const Arg& arg, ScalarType t) {
  if (t == ScalarType::Float8_e4m3fn) return DType::kE4M3;
  if (t != ScalarType::BFloat16 && t != ScalarType::Half && t != ScalarType::Float)
    refuse(arg, "bfloat16, float16, float32 or float8_e4m3fn", dtype_text(t));
  return check_float(arg, t);
}

inline Granularity check_granularity(const char* op, const std::string& name) {
  if (name == "token") return Granularity::kToken;
  if (name == "class") return Granularity::kClass;
  if (name == "block") return Granularity::kBlock;
  refuse(Arg{op, "granularity"}, "one of token, class, block", "'" + name + "'");
}

// 'token' is one scale for all of a token, so all of it must have one precision.
inline void check_one_precision(const char* op, Granularity g, int64_t K8, int64_t Kp) {
  if (g == Granularity::kToken && K8 > 0 && K8 < Kp)
    refuse(Arg{op, "granularity"}, "'class' or 'block' with mixed precision",
           "'token' with K8=" + std::to_string(K8) + " of " + std::to_string(Kp));
}

inline int64_t scale_rows(Granularity g, int64_t blocks) {
  return g == Granularity::kToken ? 1 : g == Granularity::kClass ? 2 : blocks;
}

}  // namespace tessella
