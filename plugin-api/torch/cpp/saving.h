// What happens to the tensors that operations of this thread save for the backward pass.
//
// Every such tensor passes a hook of the autograd engine, which libtorch's Python half uses for the same purpose; its
// C++ half offers the hook to subclasses of the engine only.
#pragma once
#include "guard.h"

#include <torch/csrc/autograd/saved_variable_hooks.h>

#include <cstdint>
#include <memory>

namespace moeut {

// The Rust side: computes something once more, from tensors and into tensors. Returns true on success and writes its
// error into `error` otherwise.
struct Again {
  bool (*call)(void* user, const List* given, List* made, std::string* error);
  void (*drop)(void* user);
};

// Owns a Rust object, which belongs to the thread that made it.
class Rerun {
 public:
  Rerun(Again again, void* user);
  // What belongs to one thread is not dropped on another; it leaks rather than to be touched there.
  ~Rerun();
  Rerun(const Rerun&) = delete;
  Rerun& operator=(const Rerun&) = delete;

  // On the thread that made it.
  List operator()(const List& given) const;

 private:
  Again again_;
  void* user_;
  const uint64_t thread_;
};

// Decides about saved tensors.
class Saver {
 public:
  virtual ~Saver() = default;
  // The hook of the next one.
  virtual std::unique_ptr<torch::autograd::SavedVariableHooks> hook() = 0;
  // One was saved, be it by the decision of a saver further inside.
  virtual void saw(const at::Tensor&) {}
};

// While it lives, `saver` decides on this thread; then the one before does again.
class Saving {
 public:
  explicit Saving(std::shared_ptr<Saver> saver);
  ~Saving();
  Saving(const Saving&) = delete;
  Saving& operator=(const Saving&) = delete;

  // The innermost one of this thread; null without any.
  static Saver* current();
  // Tells all of them.
  static void tell(const at::Tensor& tensor);

 private:
  std::shared_ptr<Saver> saver_;
  Saving* before_;
};

}  // namespace moeut
