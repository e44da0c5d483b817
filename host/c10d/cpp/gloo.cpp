// Groups of CPUs: Gloo over TCP.
#include "c10d.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

using moeut::Group;
using moeut::Store;
using moeut::Text;
using moeut::Work;
using moeut::checked;
using moeut::guard;

namespace {

// c10d's group plus what it lacks: an end to waiting.
class Gloo : public c10d::ProcessGroupGloo {
 public:
  using ProcessGroupGloo::ProcessGroupGloo;

  // Gives every connection an error, which is what a peer's death does, too: all that waits for one fails with it.
  void abort() override {
    for (const auto& context : contexts_) {
      for (int peer = 0; peer < getSize(); ++peer) {
        if (peer == getRank()) continue;
        auto* pair = context->getPair(peer).get();
        if (pair != nullptr) reinterpret_cast<gloo::transport::tcp::Pair*>(pair)->signalExceptionExternal("aborted");
      }
    }
  }
};

class GlooGroup : public Group {
 public:
  explicit GlooGroup(c10::intrusive_ptr<Gloo> gloo) : Group(at::Device(at::kCPU)), gloo_(std::move(gloo)) {}

  c10d::Backend& backend() override { return *gloo_; }

  // Gloo has none; c10d sums the whole, too, but does not say when that has ended.
  Work reduce_scatter(at::Tensor part, at::Tensor whole) override {
    std::vector<at::Tensor> sum{whole.clone()};
    const auto first = gloo_->getRank() * part.numel();
    auto finish = [part, sum = sum[0], first] {
      const at::NoGradGuard no_grad;
      part.copy_(sum.narrow(0, first, part.numel()));
    };
    return {{gloo_->allreduce(sum)}, std::move(finish)};
  }

  void abort() override { gloo_->abort(); }
  // Waiting is the only way to go on after an operation, and it tells.
  bool has_failed() override { return false; }

 private:
  c10::intrusive_ptr<Gloo> gloo_;
};

}  // namespace

extern "C" {

// On the given interfaces, or on the one that has `address` where there are none.
char* moeut_c10d_gloo_new(const Store* store, Text prefix, int rank, int n_ranks, uint64_t timeout_ms,
                          const Text* interfaces, size_t n_interfaces, Text address, Group** group) {
  return guard([&] {
    const auto timeout = moeut::milliseconds(timeout_ms);
    auto options = Gloo::Options::create(timeout);
    for (size_t i = 0; i < n_interfaces; ++i) {
      options->devices.push_back(Gloo::createDeviceForInterface(interfaces[i].string()));
    }
    if (n_interfaces == 0) options->devices.push_back(Gloo::createDeviceForHostname(address.string()));
    auto gloo =
        c10::make_intrusive<Gloo>(checked(store, "store").connect(prefix, timeout), rank, n_ranks, std::move(options));
    checked(group, "group") = new GlooGroup(std::move(gloo));
  });
}

}  // extern "C"
