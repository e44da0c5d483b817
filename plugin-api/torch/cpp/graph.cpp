// CUDA graphs: libtorch's at::cuda::CUDAGraph, which lives in libtorch_cuda.so and is found there at run time.
//
// Its header wants CUDA's. An object's size is not known from here, so it is built in storage that is far larger. In
// libtorch 2.11.0+cu130 it has 104 bytes: the constructor, read with `objdump -d`, writes 0x61 as its last byte, and all
// members are aligned to 8.
#include "guard.h"
#include "lookup.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/version.h>

#include <cstddef>
#include <memory>
#include <utility>

static_assert(TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR == 11,
              "check functions and size of CUDAGraph in this version of libtorch, then name it here");

using moeut::checked;
using moeut::device_of;
using moeut::find;
using moeut::guard;

namespace {

using Pool = std::pair<unsigned long long, unsigned long long>;

c10::Stream exchange_stream(c10::Stream stream) {
  return c10::impl::getDeviceGuardImpl(at::kCUDA)->exchangeStream(stream);
}

}  // namespace

// A graph, and while it is captured the stream that was this thread's before.
struct MoeutGraph {
  MoeutGraph() : destroy_(find<void (*)(void*)>("_ZN2at4cuda9CUDAGraphD1Ev")) {
    find<void (*)(void*, bool)>("_ZN2at4cuda9CUDAGraphC1Eb")(storage_, false);
  }
  ~MoeutGraph() { destroy_(storage_); }
  MoeutGraph(const MoeutGraph&) = delete;
  MoeutGraph& operator=(const MoeutGraph&) = delete;

  void begin(at::Device device, Pool pool) {
    // Other threads may do meanwhile what a captured thread must not, such as saving a checkpoint.
    constexpr int this_thread_only = 1;
    const auto* impl = c10::impl::getDeviceGuardImpl(at::kCUDA);
    const auto begin = find<void (*)(void*, Pool, int)>("_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode");
    before_ = exchange_stream(impl->getStreamFromGlobalPool(device, /*isHighPriority=*/false));
    try {
      begin(storage_, pool, this_thread_only);
    } catch (...) {
      exchange_stream(before_);
      throw;
    }
  }

  void end() {
    const auto end = find<void (*)(void*)>("_ZN2at4cuda9CUDAGraph11capture_endEv");
    try {
      end(storage_);
    } catch (...) {
      exchange_stream(before_);
      throw;
    }
    exchange_stream(before_);
  }

  Pool pool() const { return find<Pool (*)(const void*)>("_ZN2at4cuda9CUDAGraph4poolEv")(storage_); }
  void replay() { find<void (*)(void*)>("_ZN2at4cuda9CUDAGraph6replayEv")(storage_); }

 private:
  void (*destroy_)(void*);
  c10::Stream before_{c10::Stream::DEFAULT, at::Device(at::kCUDA, 0)};
  alignas(std::max_align_t) std::byte storage_[1024];
};

extern "C" {

// Waits for the device, gives cached memory back, and captures what this thread queues from now on. The graph's memory
// comes from the pool of `neighbor`, if there is one.
char* moeut_graph_begin(int code, const MoeutGraph* neighbor, MoeutGraph** graph) {
  return guard([&] {
    const auto device = device_of(code);
    TORCH_CHECK(device.is_cuda(), "the CPU has no CUDA graphs");
    TORCH_CHECK(at::globalContext().hasCUDA(), "libtorch sees no CUDA device");
    auto& result = checked(graph, "graph");
    at::accelerator::synchronizeDevice(device.index());
    at::accelerator::emptyCache();
    auto captured = std::make_unique<MoeutGraph>();
    captured->begin(device, neighbor == nullptr ? Pool(0, 0) : neighbor->pool());
    result = captured.release();
  });
}

char* moeut_graph_end(MoeutGraph* graph) {
  return guard([&] { checked(graph, "graph").end(); });
}

char* moeut_graph_replay(MoeutGraph* graph) {
  return guard([&] { checked(graph, "graph").replay(); });
}

void moeut_graph_free(MoeutGraph* graph) { delete graph; }
}
