// What every function of the shim obeys: arguments and results travel as lists of tensors, an error is a text that the
// caller frees, and no exception leaves. There are no globals here: this code is copied into every library that uses it.
#pragma once
#define AT_PER_OPERATOR_HEADERS

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <exception>
#include <string>
#include <vector>

namespace moeut {

using List = std::vector<at::Tensor>;

// Runs `body`; null means success, anything else is a text made by `strdup`.
template <typename Body>
char* guard(Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("an exception that is no std::exception");
  }
}

template <typename T>
T& checked(T* pointer, const char* name) {
  TORCH_CHECK(pointer != nullptr, "`", name, "` is a null pointer");
  return *pointer;
}

inline void check_defined(const List& tensors, const char* name) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(tensors[i].defined(), "`", name, "[", i, "]` is an undefined tensor");
  }
}

// Devices cross as one number, as in tch: -1 is the CPU, `i` is CUDA device `i`.
inline at::Device device_of(int code) {
  TORCH_CHECK(code >= -1 && code < 128, "device number ", code, " is outside -1..128");
  return code < 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(code));
}

}  // namespace moeut
