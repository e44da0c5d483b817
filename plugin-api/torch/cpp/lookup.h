// Functions of libtorch's CUDA libraries, which one build for all machines finds when it runs, by the names that the ABI
// gives them. A member function is called as a function whose first argument is the object.
#pragma once
#include <c10/util/Exception.h>

#include <dlfcn.h>

namespace moeut {

template <typename Function>
Function find(const char* symbol) {
  void* address = dlsym(RTLD_DEFAULT, symbol);
  TORCH_CHECK(address != nullptr, "`", symbol, "` is not in this process: libtorch's CUDA libraries are not loaded");
  return reinterpret_cast<Function>(address);
}

}  // namespace moeut
