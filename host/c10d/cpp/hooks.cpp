// Callbacks when a gradient is complete.
#include "guard.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>

using moeut::checked;
using moeut::guard;
using torch::autograd::variable_list;

namespace {

// The Rust side. `call` returns true on success and writes its error into `error` otherwise; it may run on several
// threads at once and after the owner has let go, until `drop`.
struct Callback {
  bool (*call)(void* user, size_t index, std::string* error);
  void (*drop)(void* user);
};

// Owns the Rust object; all hooks of one registration share it.
struct Holder {
  Holder(Callback callback, void* user) : callback(callback), user(user) {}
  Holder(const Holder&) = delete;
  Holder& operator=(const Holder&) = delete;
  ~Holder() { callback.drop(user); }

  Callback callback;
  void* user;
};

// Runs after the node that adds a gradient to its parameter's.
struct Hook : torch::autograd::FunctionPostHook {
  Hook(std::shared_ptr<Holder> holder, size_t index) : holder(std::move(holder)), index(index) {}

  variable_list operator()(const variable_list& outputs, const variable_list&) override {
    std::string error;
    if (!holder->callback.call(holder->user, index, &error)) {
      throw std::runtime_error("the callback of gradient " + std::to_string(index) + ": " + error);
    }
    return outputs;
  }

  std::shared_ptr<Holder> holder;
  size_t index;
};

// A parameter refers to its accumulating node weakly; who wants its hooks to stay keeps it.
using Nodes = std::vector<std::shared_ptr<torch::autograd::Node>>;

}  // namespace

extern "C" {

void moeut_c10d_error_set(std::string* error, const char* text, size_t length) {
  // Out of memory here loses the text, not the error.
  if (error != nullptr) std::free(guard([&] { error->assign(text, length); }));
}

// Takes ownership of `user`, whatever happens.
char* moeut_c10d_hooks_new(const at::Tensor* const* params, size_t n_params, Callback callback, void* user,
                           Nodes** hooks) {
  bool is_held = false;
  char* error = guard([&] {
    auto holder = std::make_shared<Holder>(callback, user);
    is_held = true;
    auto nodes = std::make_unique<Nodes>();
    for (size_t i = 0; i < n_params; ++i) {
      const auto& param = checked(params[i], "param");
      TORCH_CHECK(param.defined() && param.is_leaf() && param.requires_grad(), "tensor ", i,
                  " is no parameter: only a leaf that requires a gradient accumulates one");
      nodes->push_back(torch::autograd::impl::grad_accumulator(param));
    }
    for (size_t i = 0; i < n_params; ++i) (*nodes)[i]->add_post_hook(std::make_unique<Hook>(holder, i));
    checked(hooks, "hooks") = nodes.release();
  });
  if (!is_held) callback.drop(user);
  return error;
}

void moeut_c10d_hooks_free(Nodes* hooks) { delete hooks; }

}  // extern "C"
