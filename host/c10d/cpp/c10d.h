// What the files of this shim share: texts and durations as they cross, and what they keep for Rust.
#pragma once
#include "guard.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <chrono>

namespace moeut {

// Bytes of Rust's, borrowed for the time of a call.
struct Text {
  const char* data;
  size_t length;

  std::string string() const { return length == 0 ? std::string() : std::string(data, length); }
};

inline std::chrono::milliseconds milliseconds(uint64_t count) {
  // Within what a 64-bit number of nanoseconds holds; some waits of c10d count in these.
  constexpr uint64_t year = 365ull * 24 * 60 * 60 * 1000;
  return std::chrono::milliseconds(std::min(std::max<uint64_t>(count, 1), year));
}

struct Store {
  c10::intrusive_ptr<c10d::TCPStore> tcp;

  // A connection of its own below `prefix`: whoever waits on it holds up nobody else.
  c10::intrusive_ptr<c10d::Store> connect(const Text& prefix, std::chrono::milliseconds timeout) const {
    auto store = c10::make_intrusive<c10d::PrefixStore>(prefix.string(), tcp->clone());
    store->setTimeout(timeout);
    return store;
  }
};

// A process group, on one device.
class Group {
 public:
  explicit Group(at::Device device) : device(device) {}
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;
  virtual ~Group() = default;

  virtual c10d::Backend& backend() = 0;
  // Ends all waiting, also that of other threads. Waits for nobody.
  virtual void abort() = 0;
  // Whether an operation failed after the host had stopped to wait for it.
  virtual bool has_failed() = 0;

  const at::Device device;
};

// The operations of one call.
using Work = std::vector<c10::intrusive_ptr<c10d::Work>>;

}  // namespace moeut
