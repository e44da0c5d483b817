// Custom autograd functions whose forward and backward are Rust callbacks.
#include "guard.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdlib>
#include <stdexcept>

using moeut::List;
using moeut::checked;
using moeut::guard;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// The Rust side of one function. A callback returns true on success and writes its error into `error` otherwise.
struct Callbacks {
  bool (*forward)(void* user, void* call, const List* inputs, List* outputs, std::string* error);
  bool (*backward)(void* user, void* call, const List* grads, List* input_grads, std::string* error);
  void (*drop)(void* user);
};

// Owns the Rust object; the graph node and the running call share it, the last of them drops it.
struct Holder : torch::CustomClassHolder {
  Holder(Callbacks callbacks, void* user, std::vector<bool> needs_grad)
      : callbacks(callbacks), user(user), needs_grad(std::move(needs_grad)) {}
  ~Holder() override { callbacks.drop(user); }

  Callbacks callbacks;
  void* user;
  std::vector<bool> needs_grad;  // as it was when the function was applied
};

// What Rust sees as `Context`.
struct Call {
  AutogradContext* context;
  const Holder* holder;
  bool in_forward;
  bool has_saved;
};

constexpr const char* kHolder = "moeut";

struct RustFunction : torch::autograd::Function<RustFunction> {
  static variable_list forward(AutogradContext* context, at::TensorList inputs, c10::intrusive_ptr<Holder> holder) {
    context->set_materialize_grads(false);
    context->saved_data[kHolder] = c10::IValue::make_capsule(holder);
    Call call{context, holder.get(), true, false};
    const List in(inputs.begin(), inputs.end());
    List out;
    std::string error;
    const bool ok = holder->callbacks.forward(holder->user, &call, &in, &out, &error);
    if (!ok) throw std::runtime_error("forward of a custom function: " + error);
    TORCH_CHECK(!out.empty(), "forward of a custom function returned no tensor");
    moeut::check_defined(out, "outputs");
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto capsule = context->saved_data.at(kHolder).toCapsule();
    const auto* holder = static_cast<const Holder*>(capsule.get());
    Call call{context, holder, false, false};
    List out;
    std::string error;
    const bool ok = holder->callbacks.backward(holder->user, &call, &grads, &out, &error);
    if (!ok) throw std::runtime_error("backward of a custom function: " + error);
    const auto n_inputs = holder->needs_grad.size();
    TORCH_CHECK(out.size() == n_inputs, "backward of a custom function returned ", out.size(), " gradients for ", n_inputs,
                " inputs");
    out.emplace_back();  // libtorch counts the holder as an input, too
    return out;
  }
};

}  // namespace

extern "C" {

void moeut_error_set(std::string* error, const char* text, size_t length) {
  // Out of memory here loses the text, not the error.
  if (error != nullptr) std::free(guard([&] { error->assign(text, length); }));
}

// Takes ownership of `user`, whatever happens.
char* moeut_function_apply(Callbacks callbacks, void* user, const List* inputs, List* outputs) {
  bool is_held = false;
  char* error = guard([&] {
    const auto& in = checked(inputs, "inputs");
    moeut::check_defined(in, "inputs");
    TORCH_CHECK(!in.empty(), "a custom function needs at least one input");
    std::vector<bool> needs_grad;
    for (const auto& tensor : in) needs_grad.push_back(at::GradMode::is_enabled() && tensor.requires_grad());
    auto holder = c10::make_intrusive<Holder>(callbacks, user, std::move(needs_grad));
    is_held = true;
    // As a TensorList: libtorch does not look for variables inside a std::vector and would record no graph.
    checked(outputs, "outputs") = RustFunction::apply(at::TensorList(in), std::move(holder));
  });
  if (!is_held) callbacks.drop(user);
  return error;
}

char* moeut_context_save(Call* call, const List* tensors) {
  return guard([&] {
    auto& current = checked(call, "call");
    TORCH_CHECK(current.in_forward, "`save` works in forward only");
    TORCH_CHECK(!current.has_saved, "`save` was called twice in one forward; pass all tensors in one call");
    moeut::check_defined(checked(tensors, "tensors"), "tensors");
    current.context->save_for_backward(*tensors);
    current.has_saved = true;
  });
}

char* moeut_context_saved(const Call* call, List* tensors) {
  return guard([&] {
    const auto& current = checked(call, "call");
    TORCH_CHECK(!current.in_forward, "`saved` works in backward only");
    checked(tensors, "tensors") = current.context->get_saved_variables();
  });
}

char* moeut_context_needs_input_grad(const Call* call, size_t index, bool* needs_grad) {
  return guard([&] {
    const auto& current = checked(call, "call");
    const auto n_inputs = current.holder->needs_grad.size();
    TORCH_CHECK(index < n_inputs, "input ", index, " of a function of ", n_inputs, " inputs");
    checked(needs_grad, "needs_grad") =
        current.in_forward ? current.holder->needs_grad[index] : current.context->needs_input_grad(index);
  });
}

}  // extern "C"
