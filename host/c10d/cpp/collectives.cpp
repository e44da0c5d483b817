// The operations of a group, whatever its backend.
#include "c10d.h"

#include <cstdlib>

using moeut::Group;
using moeut::Work;
using moeut::checked;
using moeut::guard;

namespace {

// Numbers as in `Reduction` of the Rust side.
c10d::ReduceOp reduction(int code) {
  constexpr c10d::ReduceOp::RedOpType codes[] = {c10d::ReduceOp::SUM, c10d::ReduceOp::MAX, c10d::ReduceOp::MIN};
  TORCH_CHECK(code >= 0 && code < 3, "reduction number ", code);
  return codes[code];
}

// Without their graph: the engine writes into the storage, also into a parameter's.
at::Tensor operand(const Group& group, const at::Tensor* tensor) {
  const auto& given = checked(tensor, "tensor");
  TORCH_CHECK(given.defined(), "an undefined tensor cannot travel");
  TORCH_CHECK(given.device() == group.device, "a tensor on ", given.device(), " in a group on ", group.device);
  TORCH_CHECK(given.layout() == at::kStrided && given.is_contiguous(), "a tensor of ", given.sizes(), " with strides ",
              given.strides(), " is not contiguous");
  return given.detach();
}

moeut::List operands(const Group& group, const at::Tensor* const* tensors, size_t n_tensors) {
  TORCH_CHECK(n_tensors > 0, "there is no tensor to send");
  moeut::List list;
  for (size_t i = 0; i < n_tensors; ++i) list.push_back(operand(group, tensors[i]));
  return list;
}

void check_parts(const at::Tensor& whole, const at::Tensor& part, int n_ranks) {
  TORCH_CHECK(whole.dim() == 1 && part.dim() == 1, "flat tensors are needed, not ", whole.sizes(), " and ", part.sizes());
  TORCH_CHECK(whole.numel() == n_ranks * part.numel(), whole.numel(), " elements are not ", n_ranks, " times ",
              part.numel());
  TORCH_CHECK(whole.scalar_type() == part.scalar_type(), whole.scalar_type(), " and ", part.scalar_type(),
              " do not mix");
}

void hand_over(Work works, Work** work) { checked(work, "work") = new Work(std::move(works)); }

}  // namespace

extern "C" {

char* moeut_c10d_all_reduce(Group* group, const at::Tensor* const* tensors, size_t n_tensors, int op, Work** work) {
  return guard([&] {
    auto& in = checked(group, "group");
    auto list = operands(in, tensors, n_tensors);
    for (const auto& tensor : list) {
      TORCH_CHECK(tensor.scalar_type() == list[0].scalar_type(), list[0].scalar_type(), " and ", tensor.scalar_type(),
                  " do not travel together");
    }
    c10d::AllreduceCoalescedOptions options;
    options.reduceOp = reduction(op);
    // A single tensor needs no buffer to be copied into.
    auto started =
        list.size() == 1 ? in.backend().allreduce(list, options) : in.backend().allreduce_coalesced(list, options);
    hand_over({{std::move(started)}, {}}, work);
  });
}

char* moeut_c10d_broadcast(Group* group, const at::Tensor* const* tensors, size_t n_tensors, int root, Work** work) {
  return guard([&] {
    auto& in = checked(group, "group");
    c10d::BroadcastOptions options;
    options.rootRank = root;
    Work works;
    for (const auto& tensor : operands(in, tensors, n_tensors)) {
      moeut::List one{tensor};
      works.operations.push_back(in.backend().broadcast(one, options));
    }
    hand_over(std::move(works), work);
  });
}

char* moeut_c10d_all_gather(Group* group, const at::Tensor* into, const at::Tensor* from, Work** work) {
  return guard([&] {
    auto& in = checked(group, "group");
    auto whole = operand(in, into);
    auto part = operand(in, from);
    check_parts(whole, part, in.backend().getSize());
    hand_over({{in.backend()._allgather_base(whole, part)}, {}}, work);
  });
}

char* moeut_c10d_reduce_scatter(Group* group, const at::Tensor* into, const at::Tensor* from, Work** work) {
  return guard([&] {
    auto& in = checked(group, "group");
    auto part = operand(in, into);
    auto whole = operand(in, from);
    check_parts(whole, part, in.backend().getSize());
    hand_over(in.reduce_scatter(part, whole), work);
  });
}

char* moeut_c10d_barrier(Group* group, Work** work) {
  return guard([&] {
    auto& in = checked(group, "group");
    c10d::BarrierOptions options;
    if (in.device.is_cuda()) options.device = in.device;
    hand_over({{in.backend().barrier(options)}, {}}, work);
  });
}

char* moeut_c10d_work_wait(Work* work) {
  return guard([&] {
    const auto& started = checked(work, "work");
    for (const auto& operation : started.operations) {
      TORCH_CHECK(operation->wait(), "the operation was aborted");
    }
    if (started.finish) started.finish();
  });
}

char* moeut_c10d_work_is_done(Work* work, bool* is_done) {
  return guard([&] {
    bool all = true;
    for (const auto& operation : checked(work, "work").operations) all = all && operation->isCompleted();
    checked(is_done, "is_done") = all;
  });
}

void moeut_c10d_work_free(Work* work) { delete work; }

// These may end in an exception of the engine, too; a group that is going has nobody left to tell.
void moeut_c10d_group_free(Group* group) { std::free(guard([&] { delete group; })); }

char* moeut_c10d_group_abort(Group* group) {
  return guard([&] { checked(group, "group").abort(); });
}

char* moeut_c10d_group_has_failed(Group* group, bool* has_failed) {
  return guard([&] { checked(has_failed, "has_failed") = checked(group, "group").has_failed(); });
}

}  // extern "C"
