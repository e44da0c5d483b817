// Fused optimizer steps and gradient clipping over lists of tensors.
#include "guard.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <map>
#include <tuple>

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

struct AdamLists {
  List params, grads, exp_avgs, exp_avg_sqs, steps;
};

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

std::map<Group, AdamLists> adam_groups(const List& params, const List& grads, const List& exp_avgs,
                                       const List& exp_avg_sqs, const List& steps) {
  check_floating(params, "params");
  check_state(params, grads, "grads");
  check_state(params, exp_avgs, "exp_avg");
  check_state(params, exp_avg_sqs, "exp_avg_sq");
  check_layout(params, exp_avgs, "exp_avg");
  check_layout(params, exp_avg_sqs, "exp_avg_sq");
  check_floating(steps, "steps");
  TORCH_CHECK(steps.size() == params.size(), "`steps` has ", steps.size(), " tensors, `params` has ", params.size());

  std::map<Group, AdamLists> groups;
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(params[i].is_non_overlapping_and_dense(), "`params[", i, "]` has strides ", params[i].strides(),
                " with gaps or overlaps");
    TORCH_CHECK(steps[i].scalar_type() == at::kFloat && steps[i].numel() == 1 && steps[i].device() == params[i].device(),
                "`steps[", i, "]` must be one Float on ", params[i].device(), ", got ", steps[i].numel(), " ",
                steps[i].scalar_type(), " on ", steps[i].device());
    auto& group = groups[group_of(params[i])];
    group.params.push_back(params[i]);
    group.grads.push_back(in_layout_of(params[i], grads[i]));
    group.exp_avgs.push_back(exp_avgs[i]);
    group.exp_avg_sqs.push_back(exp_avg_sqs[i]);
    group.steps.push_back(steps[i]);
  }
  return groups;
}

void scale(const List& tensors, const at::Tensor& factor) {
  for (const auto& [group, members] : grouped(tensors)) {
    at::_foreach_mul_(members, factor.to(members.front().device(), /*non_blocking=*/true));
  }
}

at::Tensor global_norm(const List& tensors) {
  check_floating(tensors, "tensors");
  if (tensors.empty()) return at::zeros({}, at::kFloat);
  const auto device = tensors.front().device();
  List norms;
  for (const auto& [group, members] : grouped(tensors)) {
    for (const auto& norm : at::_foreach_norm(members, 2)) norms.push_back(norm.to(device, /*non_blocking=*/true));
  }
  return at::linalg_vector_norm(at::stack(norms), 2);
}

}  // namespace

extern "C" {

char* moeut_fused_adam(const List* params, const List* grads, const List* exp_avgs, const List* exp_avg_sqs,
                       const List* steps, double lr, double beta1, double beta2, double weight_decay, double eps,
                       bool is_decoupled) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    auto groups = adam_groups(checked(params, "params"), checked(grads, "grads"), checked(exp_avgs, "exp_avg"),
                              checked(exp_avg_sqs, "exp_avg_sq"), checked(steps, "steps"));
    const auto step = is_decoupled
        ? [](AdamLists& g, double a, double b, double c, double d, double e) {
            at::_fused_adamw_(g.params, g.grads, g.exp_avgs, g.exp_avg_sqs, {}, g.steps, a, b, c, d, e, false, false);
          }
        : [](AdamLists& g, double a, double b, double c, double d, double e) {
            at::_fused_adam_(g.params, g.grads, g.exp_avgs, g.exp_avg_sqs, {}, g.steps, a, b, c, d, e, false, false);
          };
    for (auto& [key, group] : groups) {
      at::_foreach_add_(group.steps, 1);
      step(group, lr, beta1, beta2, weight_decay, eps);
    }
  });
}

char* moeut_global_norm(const List* tensors, List* norm) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    checked(norm, "norm") = {global_norm(checked(tensors, "tensors"))};
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

char* moeut_clip_grad_norm(const List* tensors, double max_norm, List* norm) {
  return guard([&] {
    const at::NoGradGuard no_grad;
    const auto total = global_norm(checked(tensors, "tensors"));
    scale(*tensors, total.add(1e-6).reciprocal().mul(max_norm).clamp_max(1.0));
    checked(norm, "norm") = {total};
  });
}

}  // extern "C"
