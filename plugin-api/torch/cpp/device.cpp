// Device state: random generators, autocast, the CUDA library and its memory, the version of libtorch.
#include "guard.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/version.h>

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>

using moeut::List;
using moeut::checked;
using moeut::device_of;
using moeut::guard;

namespace {

at::Device cuda_device(int code) {
  const auto device = device_of(code);
  TORCH_CHECK(device.is_cuda(), "the CPU has no caching allocator to ask");
  TORCH_CHECK(at::globalContext().hasCUDA(), "libtorch sees no CUDA device");
  const int n_devices = at::accelerator::deviceCount();
  TORCH_CHECK(code < n_devices, "CUDA device ", code, " is asked for, there are ", n_devices);
  at::globalContext().lazyInitDevice(at::kCUDA);
  return device;
}

at::Generator generator_of(int code) {
  const auto device = device_of(code);
  return at::globalContext().defaultGenerator(device.is_cpu() ? device : cuda_device(code));
}

// The folder of the libtorch in this process, so that its CUDA half comes from the same installation.
std::string cuda_library() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&at::globalContext), &info) == 0 || info.dli_fname == nullptr) {
    return "libtorch_cuda.so";
  }
  const std::string file = info.dli_fname;
  const auto slash = file.rfind('/');
  return slash == std::string::npos ? "libtorch_cuda.so" : file.substr(0, slash + 1) + "libtorch_cuda.so";
}

}  // namespace

extern "C" {

struct MoeutMemory {
  int64_t allocated, allocated_peak, reserved, reserved_peak, free, total;
};

char* moeut_rng_state(int device, List* state) {
  return guard([&] {
    auto generator = generator_of(device);
    const std::lock_guard<std::mutex> lock(generator.mutex());
    checked(state, "state") = {generator.get_state()};
  });
}

char* moeut_rng_set_state(int device, const at::Tensor* state) {
  return guard([&] {
    const auto& bytes = checked(state, "state");
    TORCH_CHECK(bytes.defined() && bytes.is_cpu() && bytes.scalar_type() == at::kByte && bytes.is_contiguous(),
                "a generator state is a contiguous Uint8 tensor on the CPU");
    auto generator = generator_of(device);
    const std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(bytes);
  });
}

char* moeut_rng_seed(uint64_t seed) {
  return guard([&] { at::manual_seed(seed); });
}

// Turns autocast of a device type on (with a dtype) or off and reports what was set before.
char* moeut_autocast_enter(bool is_cuda, bool is_enabled, bool is_half, bool* was_enabled, int* previous_dtype) {
  return guard([&] {
    const auto type = is_cuda ? at::kCUDA : at::kCPU;
    checked(was_enabled, "was_enabled") = at::autocast::is_autocast_enabled(type);
    checked(previous_dtype, "previous_dtype") = static_cast<int>(at::autocast::get_autocast_dtype(type));
    at::autocast::increment_nesting();
    at::autocast::set_autocast_enabled(type, is_enabled);
    if (is_enabled) at::autocast::set_autocast_dtype(type, is_half ? at::kHalf : at::kBFloat16);
  });
}

char* moeut_autocast_leave(bool is_cuda, bool was_enabled, int previous_dtype) {
  return guard([&] {
    const auto type = is_cuda ? at::kCUDA : at::kCPU;
    at::autocast::set_autocast_enabled(type, was_enabled);
    at::autocast::set_autocast_dtype(type, static_cast<at::ScalarType>(previous_dtype));
    // Casts of parameters are cached for the outermost scope only; later they would be stale.
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  });
}

char* moeut_cuda_load(bool* has_device) {
  return guard([&] {
    const auto file = cuda_library();
    if (dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      const char* reason = dlerror();
      TORCH_CHECK(false, reason == nullptr ? file.c_str() : reason);
    }
    checked(has_device, "has_device") = at::globalContext().hasCUDA();
  });
}

char* moeut_cuda_memory(int device, MoeutMemory* memory) {
  return guard([&] {
    const auto index = cuda_device(device).index();
    const auto stats = at::accelerator::getDeviceStats(index);
    const auto [free, total] = at::accelerator::getMemoryInfo(index);
    const auto& allocated = stats.allocated_bytes[0];
    const auto& reserved = stats.reserved_bytes[0];
    checked(memory, "memory") = {allocated.current, allocated.peak, reserved.current, reserved.peak,
                                 static_cast<int64_t>(free), static_cast<int64_t>(total)};
  });
}

char* moeut_cuda_reset_peak(int device) {
  return guard([&] { at::accelerator::resetPeakStats(cuda_device(device).index()); });
}

// The `CUstream` on which libtorch queues the work of this thread.
char* moeut_cuda_stream(int device, void** stream) {
  return guard([&] {
    checked(stream, "stream") = at::accelerator::getCurrentStream(cuda_device(device).index()).native_handle();
  });
}

// A copy by way of pinned memory, queued on the current stream. The allocator of pinned memory does not hand it out again
// before the copy is done.
char* moeut_cuda_upload(const at::Tensor* tensor, int device, List* copy) {
  return guard([&] {
    const auto to = cuda_device(device);
    const auto& from = checked(tensor, "tensor");
    TORCH_CHECK(from.defined() && from.is_cpu(), "only tensors of the CPU are uploaded");
    checked(copy, "copy") = {from.pin_memory().to(to, /*non_blocking=*/true)};
  });
}

// Asks the driver, whose three functions have had the same face since its beginnings, and honors CUDA_VISIBLE_DEVICES.
char* moeut_cuda_describe(int device, char* name, int name_length, int* major, int* minor) {
  return guard([&] {
    const int index = cuda_device(device).index();
    checked(name, "name");
    TORCH_CHECK(name_length > 0, "`name_length` is ", name_length);
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    TORCH_CHECK(driver != nullptr, "there is no `libcuda.so.1`");
    const auto function = [driver](const char* symbol) {
      void* address = dlsym(driver, symbol);
      TORCH_CHECK(address != nullptr, "`libcuda.so.1` has no `", symbol, "`");
      return address;
    };
    const auto get = reinterpret_cast<int (*)(int*, int)>(function("cuDeviceGet"));
    const auto get_name = reinterpret_cast<int (*)(char*, int, int)>(function("cuDeviceGetName"));
    const auto get_attribute = reinterpret_cast<int (*)(int*, int, int)>(function("cuDeviceGetAttribute"));
    constexpr int capability_major = 75;
    constexpr int capability_minor = 76;
    int handle = 0;
    const bool is_known = get(&handle, index) == 0 && get_name(name, name_length, handle) == 0 &&
        get_attribute(&checked(major, "major"), capability_major, handle) == 0 &&
        get_attribute(&checked(minor, "minor"), capability_minor, handle) == 0;
    TORCH_CHECK(is_known, "the driver does not describe CUDA device ", index);
  });
}

// Backward passes then check every gradient for NaN and name the operation that made it. Of the whole process.
char* moeut_detect_anomaly(bool is_on) {
  return guard([&] { torch::autograd::AnomalyMode::set_enabled(is_on, /*check_nan=*/true); });
}

const char* moeut_header_version() { return TORCH_VERSION; }

// A text made by `strdup`, or null.
char* moeut_build_settings() {
  char* text = nullptr;
  std::free(guard([&] { text = strdup(at::show_config().c_str()); }));
  return text;
}

}  // extern "C"
