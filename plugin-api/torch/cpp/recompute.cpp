// Stretches of a forward pass of which nothing is kept for the backward pass: what it asks for is computed again.
//
// Every tensor that an operation saves passes a hook of the autograd engine, which libtorch's Python half uses for the
// same purpose; its C++ half offers the hook to subclasses of the engine only.
#include "guard.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/AutogradState.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <utility>

using moeut::List;
using moeut::checked;
using moeut::guard;
using torch::autograd::Engine;
using torch::autograd::SavedVariableHooks;

namespace {

// The Rust side: runs the stretch once more. Returns true on success and writes its error into `error` otherwise.
struct Again {
  bool (*call)(void* user, std::string* error);
  void (*drop)(void* user);
};

// Never another thread's, as a std::thread::id may be after a thread has ended.
uint64_t this_thread() {
  static std::atomic<uint64_t> n_threads{0};
  thread_local const uint64_t number = n_threads++;
  return number;
}

// What is known of a tensor that was not kept.
struct Likeness {
  at::ScalarType type;
  at::Device device;
  std::vector<int64_t> sizes;

  explicit Likeness(const at::Tensor& tensor)
      : type(tensor.scalar_type()), device(tensor.device()), sizes(tensor.sizes().vec()) {}
  bool operator==(const Likeness& other) const {
    return type == other.type && device == other.device && sizes == other.sizes;
  }
};

// One stretch. All hooks of its tensors share it; the last of them ends it.
struct Stretch {
  Stretch(Again again, void* user) : again(again), user(user) {}
  // What belongs to one thread is not dropped on another; it leaks rather than to be touched there.
  ~Stretch() {
    if (this_thread() == thread) again.drop(user);
  }
  Stretch(const Stretch&) = delete;
  Stretch& operator=(const Stretch&) = delete;

  Again again;
  void* user;
  const uint64_t thread = this_thread();
  // In the order in which they were saved.
  std::vector<Likeness> wanted;
  // The same tensors of the second run; undefined where one was handed out.
  List kept;
};

// What this thread does at the moment. Each library with a copy of this code has its own: libtorch asks the engine of the
// one that began a stretch last, also about tensors that the code of other libraries saves.
struct Doing {
  std::shared_ptr<Stretch> stretch;
  bool is_again = false;
};
thread_local Doing doing;

class Scope {
 public:
  explicit Scope(Doing now) : before_(std::exchange(doing, std::move(now))) {}
  ~Scope() { doing = std::move(before_); }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  Doing before_;
};

void compute_again(const std::shared_ptr<Stretch>& stretch) {
  TORCH_CHECK(this_thread() == stretch->thread,
              "a backward pass asks for activations on another thread than that of its forward pass");
  stretch->kept.clear();
  std::string error;
  const at::AutoGradMode with_grad(true);
  const Scope scope({stretch, /*is_again=*/true});
  if (!stretch->again.call(stretch->user, &error)) throw std::runtime_error("computing activations again: " + error);
  const auto& kept = stretch->kept;
  const auto& wanted = stretch->wanted;
  TORCH_CHECK(kept.size() == wanted.size(), "the second run of a part of the model saved ", kept.size(),
              " tensors, the first one ", wanted.size());
  for (size_t i = 0; i < kept.size(); ++i) {
    TORCH_CHECK(Likeness(kept[i]) == wanted[i], "tensor ", i, " of the second run of a part of the model is ",
                kept[i].scalar_type(), " ", kept[i].sizes(), ", the first one was ", wanted[i].type, " ",
                at::IntArrayRef(wanted[i].sizes));
  }
}

// One saved tensor of a stretch.
class Saved : public SavedVariableHooks {
 public:
  explicit Saved(Doing now) : stretch_(std::move(now.stretch)), is_again_(now.is_again) {}

  void call_pack_hook(const at::Tensor& tensor) override {
    if (is_again_) {
      // Without its history, which may lead back here.
      stretch_->kept.push_back(tensor.detach());
    } else {
      index_ = stretch_->wanted.size();
      stretch_->wanted.emplace_back(tensor);
    }
  }

  at::Tensor call_unpack_hook() override {
    TORCH_CHECK(!is_again_, "the graph of a second run has no backward pass");
    auto& kept = stretch_->kept;
    if (index_ >= kept.size() || !kept[index_].defined()) compute_again(stretch_);
    return std::move(kept[index_]);
  }

 private:
  std::shared_ptr<Stretch> stretch_;
  bool is_again_;
  size_t index_ = 0;
};

// libtorch's own engine does all the work; this one only answers which hook a saved tensor passes.
struct HookedEngine : Engine {
  std::unique_ptr<SavedVariableHooks> get_default_saved_variable_hooks() override {
    return doing.stretch == nullptr ? nullptr : std::make_unique<Saved>(doing);
  }
  torch::autograd::variable_list execute(const torch::autograd::edge_list& roots,
                                         const torch::autograd::variable_list& inputs, bool keep_graph, bool create_graph,
                                         bool accumulate_grad, const torch::autograd::edge_list& outputs) override {
    return get_base_engine().execute(roots, inputs, keep_graph, create_graph, accumulate_grad, outputs);
  }
};

Engine& hooked_engine() {
  static auto* engine = new HookedEngine();  // libtorch may ask for it as long as the process lives
  return *engine;
}

}  // namespace

extern "C" {

// Begins a stretch of this thread. Takes ownership of `user`, whatever happens.
char* moeut_recompute_begin(Again again, void* user, Scope** scope) {
  bool is_held = false;
  char* error = guard([&] {
    auto stretch = std::make_shared<Stretch>(again, user);
    is_held = true;
    torch::autograd::set_default_engine_stub(hooked_engine);
    // Rust objects of this thread are needed in the backward pass, so it must not move to a thread of the device.
    c10::AutogradState::get_tls_state().set_multithreading_enabled(false);
    checked(scope, "scope") = new Scope({std::move(stretch)});
  });
  if (!is_held) again.drop(user);
  return error;
}

// On the thread that began it, in reverse order.
void moeut_recompute_end(Scope* scope) { delete scope; }

}  // extern "C"
