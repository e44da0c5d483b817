// Fused optimizer steps, gradient clipping and unscaling over lists of tensors.
#include "guard.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adagrad.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <map>
#include <optional>
#include <tuple>
#include <utility>

using moeut::List;
using moeut::checked;
using moeut::guard;

namespace {

// The fused and foreach kernels want one device and one dtype per call.
using Group = std::tuple<c10::DeviceType, c10::DeviceIndex, at::ScalarType>;

Group group_of(const at::Tensor& tensor) {
  return {tensor.device().type(), tensor.device().index(), tensor.scalar_type()};
}

std::map<Group, List> grouped(const List& tensors) {
  std::map<Group, List> groups;
  for (const auto& tensor : tensors) groups[group_of(tensor)].push_back(tensor);
  return groups;
}

// What a fused step changes, for the tensors of one group. `skip` is 1 if nothing of it is to happen.
struct StepLists {
  List params, grads, steps;
  std::vector<List> state;
  std::optional<at::Tensor> skip;
};

// A list of the optimizer's state with its name in messages.
using Named = std::pair<const char*, const List*>;

void check_floating(const List& tensors, const char* name) {
  moeut::check_defined(tensors, name);
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(tensors[i].is_floating_point() && tensors[i].layout() == at::kStrided, "`", name, "[", i,
                "]` must be a dense floating-point tensor, got ", tensors[i].scalar_type(), " ", tensors[i].layout());
  }
}

// The CPU kernels walk raw memory, so a list that does not match would read and write out of bounds.
void check_state(const List& params, const List& state, const char* name) {
  TORCH_CHECK(state.size() == params.size(), "`", name, "` has ", state.size(), " tensors, `params` has ", params.size());
  check_floating(state, name);
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(state[i].sizes() == params[i].sizes() && group_of(state[i]) == group_of(params[i]), "`", name, "[", i,
                "]` is ", state[i].scalar_type(), " ", state[i].sizes(), " on ", state[i].device(), ", `params[", i, "]` is ",
                params[i].scalar_type(), " ", params[i].sizes(), " on ", params[i].device());
  }
}

void check_layout(const List& params, const List& state, const char* name) {
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(state[i].strides() == params[i].strides(), "`", name, "[", i, "]` has strides ", state[i].strides(),
                ", `params[", i, "]` has ", params[i].strides());
  }
}

// A gradient may come in another memory order than its parameter (a transposed view, an expanded scalar).
at::Tensor in_layout_of(const at::Tensor& param, const at::Tensor& grad) {
  return grad.strides() == param.strides() ? grad : at::empty_like(param).copy_(grad);
}

void check_flag(const at::Tensor& flag, const char* name) {
  TORCH_CHECK(flag.defined() && flag.scalar_type() == at::kFloat && flag.numel() == 1, "`", name, "` must be one Float");
}

// `steps` is null for a rule that does not count, `skip` for a step that is taken whatever the gradients are.
std::map<Group, StepLists> step_groups(const List& params, const List& grads, const std::vector<Named>& state,
                                       const List* steps, const at::Tensor* skip) {
  check_floating(params, "params");
  check_state(params, grads, "grads");
  for (const auto& [name, list] : state) check_state(params, checked(list, name), name);
  for (const auto& [name, list] : state) check_layout(params, *list, name);
  if (skip != nullptr) check_flag(*skip, "skip");
  if (steps != nullptr) {
    check_floating(*steps, "steps");
    TORCH_CHECK(steps->size() == params.size(), "`steps` has ", steps->size(), " tensors, `params` has ", params.size());
  }

  std::map<Group, StepLists> groups;
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(params[i].is_non_overlapping_and_dense(), "`params[", i, "]` has strides ", params[i].strides(),
                " with gaps or overlaps");
    auto& group = groups[group_of(params[i])];
    group.state.resize(state.size());
    group.params.push_back(params[i]);
    group.grads.push_back(in_layout_of(params[i], grads[i]));
    for (size_t k = 0; k < state.size(); ++k) group.state[k].push_back((*state[k].second)[i]);
    if (steps == nullptr) continue;
    const auto& step = (*steps)[i];
    TORCH_CHECK(step.scalar_type() == at::kFloat && step.numel() == 1 && step.device() == params[i].device(), "`steps[", i,
                "]` must be one Float on ", params[i].device(), ", got ", step.numel(), " ", step.scalar_type(), " on ",
                step.device());
    group.steps.push_back(step);
  }
  for (auto& [key, group] : groups) {
    if (skip != nullptr) group.skip = skip->to(group.params.front().device(), /*non_blocking=*/true);
  }
  return groups;
}

// A skipped step does not count.
void count(StepLists& group) {
  if (group.skip.has_value()) {
    at::_foreach_add_(group.steps, group.skip->reshape({}).neg().add(1));
  } else {
    at::_foreach_add_(group.steps, 1);
  }
}

void scale(const List& tensors, const at::Tensor& factor) {
  for (const auto& [group, members] : grouped(tensors)) {
    at::_foreach_mul_(members, factor.to(members.front().device(), /*non_blocking=*/true));
  }
}

// The norm of each tensor, in their order, on the first one's device.
at::Tensor norms_of(const List& tensors) {
  check_floating(tensors, "tensors");
  if (tensors.empty()) return at::zeros({0}, at::kFloat);
  const auto device = tensors.front().device();
  std::map<Group, std::pair<List, std::vector<size_t>>> groups;
  for (size_t i = 0; i < tensors.size(); ++i) {
    auto& [members, places] = groups[group_of(tensors[i])];
    members.push_back(tensors[i]);
    places.push_back(i);
  }
  List norms(tensors.size());
  for (const auto& [group, entry] : groups) {
    const auto& [members, places] = entry;
    const auto of_group = at::_foreach_norm(members, 2);
    for (size_t k = 0; k < places.size(); ++k) norms[places[k]] = of_group[k].to(device, /*non_blocking=*/true);
  }
  return at::stack(norms);
}

}  // namespace

extern "C" {

char* moeut_fused_adam(const List* params, const List* grads, const List* exp_avgs, const List* exp_avg_sqs,
                       const List* steps, double lr, double beta1, double beta2, double weight_decay, double eps,
                       bool is_decoupled, const at::Tensor* skip) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    auto groups = step_groups(checked(params, "params"), checked(grads, "grads"),
                              {{"exp_avg", exp_avgs}, {"exp_avg_sq", exp_avg_sqs}}, &checked(steps, "steps"), skip);
    for (auto& [key, group] : groups) {
      count(group);
      if (is_decoupled) {
        at::_fused_adamw_(group.params, group.grads, group.state[0], group.state[1], {}, group.steps, lr, beta1, beta2,
                          weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false, /*grad_scale=*/{}, group.skip);
      } else {
        at::_fused_adam_(group.params, group.grads, group.state[0], group.state[1], {}, group.steps, lr, beta1, beta2,
                         weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false, /*grad_scale=*/{}, group.skip);
      }
    }
  });
}

// A buffer of zeros makes the first step like any other: momentum · 0 + gradient.
char* moeut_fused_sgd(const List* params, const List* grads, const List* momentum_buffers, double lr, double momentum,
                      double weight_decay, const at::Tensor* skip) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    auto groups = step_groups(checked(params, "params"), checked(grads, "grads"), {{"momentum_buffer", momentum_buffers}},
                              /*steps=*/nullptr, skip);
    for (auto& [key, group] : groups) {
      at::_fused_sgd_(group.params, group.grads, group.state[0], weight_decay, momentum, lr, /*dampening=*/0.0,
                      /*nesterov=*/false, /*maximize=*/false, /*is_first_step=*/false, /*grad_scale=*/{}, group.skip);
    }
  });
}

char* moeut_fused_adagrad(const List* params, const List* grads, const List* sums, const List* steps, double lr,
                          double weight_decay, double eps, const at::Tensor* skip) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    auto groups = step_groups(checked(params, "params"), checked(grads, "grads"), {{"sum", sums}},
                              &checked(steps, "steps"), skip);
    for (auto& [key, group] : groups) {
      count(group);
      at::_fused_adagrad_(group.params, group.grads, group.state[0], group.steps, lr, /*lr_decay=*/0.0, weight_decay, eps,
                          /*maximize=*/false, /*grad_scale=*/{}, group.skip);
    }
  });
}

// `found` becomes 1 if a gradient has an element that is not finite, else it stays.
char* moeut_unscale(const List* tensors, const at::Tensor* inverse_scale, const at::Tensor* found) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    check_floating(checked(tensors, "tensors"), "tensors");
    check_flag(checked(inverse_scale, "inverse_scale"), "inverse_scale");
    check_flag(checked(found, "found"), "found");
    for (const auto& [group, members] : grouped(*tensors)) {
      const auto device = members.front().device();
      TORCH_CHECK(found->device() == device && inverse_scale->device() == device, "`found` is on ", found->device(),
                  " and `inverse_scale` on ", inverse_scale->device(), ", a gradient on ", device);
      at::Tensor flag = *found;
      at::_amp_foreach_non_finite_check_and_unscale_(members, flag, *inverse_scale);
      // libtorch does not count this change, and a backward pass that saved one of them would not notice it.
      for (const auto& member : members) member.unsafeGetTensorImpl()->bump_version();
    }
  });
}

char* moeut_clear_grads(const List* tensors) {
  return guard([&] {
    moeut::check_defined(checked(tensors, "tensors"), "tensors");
    for (const auto& tensor : *tensors) tensor.mutable_grad() = at::Tensor();
  });
}

char* moeut_set_grads(const List* tensors, const List* grads) {
  return guard([&] {
    moeut::check_defined(checked(tensors, "tensors"), "tensors");
    moeut::check_defined(checked(grads, "grads"), "grads");
    TORCH_CHECK(tensors->size() == grads->size(), tensors->size(), " tensors have ", grads->size(), " gradients");
    for (size_t i = 0; i < tensors->size(); ++i) {
      const auto &tensor = (*tensors)[i], &grad = (*grads)[i];
      TORCH_CHECK(grad.sizes() == tensor.sizes() && grad.options().type_equal(tensor.options()) &&
                      grad.device() == tensor.device(),
                  "gradient ", i, " has not the shape, type and device of its tensor");
      tensor.mutable_grad() = grad;
    }
  });
}

char* moeut_scale(const List* tensors, const at::Tensor* factor) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    check_floating(checked(tensors, "tensors"), "tensors");
    const auto& by = checked(factor, "factor");
    TORCH_CHECK(by.defined() && by.dim() == 0, "`factor` must be a tensor without axes");
    scale(*tensors, by);
  });
}

// Returns the norm of all tensors before, and the norm of each after.
char* moeut_clip_grad_norm(const List* tensors, double max_norm, List* norms) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    const auto each = norms_of(checked(tensors, "tensors"));
    const auto total = at::linalg_vector_norm(each, 2);
    const auto factor = total.add(1e-6).reciprocal().mul(max_norm).clamp_max(1.0);
    scale(*tensors, factor);
    checked(norms, "norms") = {total, each.mul(factor)};
  });
}

char* moeut_norms(const List* tensors, List* norms) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    const auto each = norms_of(checked(tensors, "tensors"));
    checked(norms, "norms") = {at::linalg_vector_norm(each, 2), each};
  });
}

}  // extern "C"
