// Numbers on their way from the device to the host, for which nobody waits before they are wanted.
#include "guard.h"

#include <ATen/DeviceAccelerator.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>

#include <algorithm>
#include <memory>
#include <optional>

using moeut::List;
using moeut::checked;
using moeut::guard;

struct MoeutReadback {
  at::Tensor host;
  std::optional<c10::Event> copied;
};

extern "C" {

// Starts to copy all elements of `tensors`, as Double, to pinned memory, on the current stream.
char* moeut_readback_start(const List* tensors, MoeutReadback** readback) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    auto& result = checked(readback, "readback");
    moeut::check_defined(checked(tensors, "tensors"), "tensors");
    TORCH_CHECK(!tensors->empty(), "there is nothing to read");
    const auto device = tensors->front().device();
    List flat;
    for (const auto& tensor : *tensors) flat.push_back(tensor.detach().to(device, at::kDouble).reshape({-1}));
    const auto all = at::cat(flat);
    auto made = std::make_unique<MoeutReadback>();
    if (device.is_cuda()) {
      made->host = at::empty(all.sizes(), at::TensorOptions().dtype(at::kDouble).pinned_memory(true));
      made->host.copy_(all, /*non_blocking=*/true);
      made->copied.emplace(c10::DeviceType::CUDA);
      made->copied->record(at::accelerator::getCurrentStream(device.index()));
    } else {
      made->host = all.to(at::kCPU).contiguous();
    }
    result = made.release();
  });
}

size_t moeut_readback_len(const MoeutReadback* readback) {
  return readback == nullptr ? 0 : static_cast<size_t>(readback->host.numel());
}

// Waits for this copy, not for what was enqueued behind it, and writes its `moeut_readback_len` numbers.
char* moeut_readback_wait(const MoeutReadback* readback, double* values) {
  return guard([&] {
    const auto& read = checked(readback, "readback");
    if (read.copied.has_value()) read.copied->synchronize();
    const auto* numbers = read.host.const_data_ptr<double>();
    std::copy(numbers, numbers + read.host.numel(), &checked(values, "values"));
  });
}

void moeut_readback_free(MoeutReadback* readback) { delete readback; }

}  // extern "C"
