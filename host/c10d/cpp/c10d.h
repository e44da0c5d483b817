// What the files of this shim share: texts and durations as they cross, and what they keep for Rust.
#pragma once
#include "guard.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <chrono>
#include <functional>

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

// The operations of one call, and what is left to do once they have ended.
struct Work {
  std::vector<c10::intrusive_ptr<c10d::Work>> operations;
  std::function<void()> finish;
};

// A process group, on one device.
class Group {
 public:
  explicit Group(at::Device device) : device(device) {}
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;
  virtual ~Group() = default;

  virtual c10d::Backend& backend() = 0;
  // Writes to `part` this rank's piece of the sum of all ranks' `whole`.
  virtual Work reduce_scatter(at::Tensor part, at::Tensor whole) = 0;
  // Ends all waiting, also that of other threads. Waits for nobody.
  virtual void abort() = 0;
  // Whether an operation failed after the host had stopped to wait for it.
  virtual bool has_failed() = 0;

  const at::Device device;
};

// What c10d prints on stderr, from this severity on; a user who asks for more by PyTorch's variables gets all of it.
enum Severity { kErrors = 2, kFatal = 3 };
void print_from(Severity severity);

}  // namespace moeut
