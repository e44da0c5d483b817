#include "saving.h"

#include <c10/core/AutogradState.h>
#include <torch/csrc/autograd/engine.h>

#include <atomic>
#include <stdexcept>
#include <utility>

using torch::autograd::Engine;

namespace moeut {
namespace {

// Each library with a copy of this code has its own: libtorch asks the engine of the one that began a scope last, also
// about tensors that the code of other libraries saves.
thread_local Saving* innermost = nullptr;

// Never another thread's, as a std::thread::id may be after a thread has ended.
uint64_t this_thread() {
  static std::atomic<uint64_t> n_threads{0};
  thread_local const uint64_t number = n_threads++;
  return number;
}

// libtorch's own engine does all the work; this one only answers which hook a saved tensor passes.
struct HookedEngine : Engine {
  std::unique_ptr<torch::autograd::SavedVariableHooks> get_default_saved_variable_hooks() override {
    auto* saver = Saving::current();
    return saver == nullptr ? nullptr : saver->hook();
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

Rerun::Rerun(Again again, void* user) : again_(again), user_(user), thread_(this_thread()) {}

Rerun::~Rerun() {
  if (this_thread() == thread_) again_.drop(user_);
}

List Rerun::operator()(const List& given) const {
  TORCH_CHECK(this_thread() == thread_,
              "a backward pass asks for activations on another thread than that of its forward pass");
  List made;
  std::string error;
  if (!again_.call(user_, &given, &made, &error)) throw std::runtime_error("computing activations again: " + error);
  return made;
}

Saving::Saving(std::shared_ptr<Saver> saver) : saver_(std::move(saver)), before_(innermost) {
  torch::autograd::set_default_engine_stub(hooked_engine);
  // Rust objects of this thread are needed in the backward pass, so it must not move to a thread of the device.
  c10::AutogradState::get_tls_state().set_multithreading_enabled(false);
  innermost = this;
}

Saving::~Saving() { innermost = before_; }

Saver* Saving::current() { return innermost == nullptr ? nullptr : innermost->saver_.get(); }

void Saving::tell(const at::Tensor& tensor) {
  for (auto* saving = innermost; saving != nullptr; saving = saving->before_) saving->saver_->saw(tensor);
}

}  // namespace moeut

extern "C" {

// On the thread that began it, in reverse order.
void moeut_saving_end(moeut::Saving* saving) { delete saving; }

}  // extern "C"
