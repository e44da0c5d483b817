// Stretches of a forward pass of which nothing is kept for the backward pass: what it asks for is computed again.
#include "saving.h"

#include <ATen/core/grad_mode.h>

#include <utility>

using moeut::Again;
using moeut::List;
using moeut::Rerun;
using moeut::Saver;
using moeut::Saving;
using moeut::checked;
using moeut::guard;
using torch::autograd::SavedVariableHooks;

namespace {

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
  Stretch(Again again, void* user) : again(again, user) {}

  Rerun again;
  // In the order in which they were saved.
  std::vector<Likeness> wanted;
  // The same tensors of the second run; undefined where one was handed out.
  List kept;
};

// The first run of a stretch, or one that is done again.
class Run : public Saver {
 public:
  Run(std::shared_ptr<Stretch> stretch, bool is_again) : stretch_(std::move(stretch)), is_again_(is_again) {}
  std::unique_ptr<SavedVariableHooks> hook() override;

 private:
  std::shared_ptr<Stretch> stretch_;
  bool is_again_;
};

void compute_again(const std::shared_ptr<Stretch>& stretch) {
  stretch->kept.clear();
  const at::AutoGradMode with_grad(true);
  const Saving saving(std::make_shared<Run>(stretch, /*is_again=*/true));
  stretch->again({});
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
  Saved(std::shared_ptr<Stretch> stretch, bool is_again) : stretch_(std::move(stretch)), is_again_(is_again) {}

  void call_pack_hook(const at::Tensor& tensor) override {
    if (is_again_) {
      // Without its history, which may lead back here.
      stretch_->kept.push_back(tensor.detach());
    } else {
      index_ = stretch_->wanted.size();
      stretch_->wanted.emplace_back(tensor);
      Saving::tell(tensor);
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

std::unique_ptr<SavedVariableHooks> Run::hook() { return std::make_unique<Saved>(stretch_, is_again_); }

}  // namespace

extern "C" {

// Begins a stretch of this thread. Takes ownership of `user`, whatever happens.
char* moeut_recompute_begin(Again again, void* user, Saving** saving) {
  bool is_held = false;
  char* error = guard([&] {
    auto stretch = std::make_shared<Stretch>(again, user);
    is_held = true;
    checked(saving, "saving") = new Saving(std::make_shared<Run>(std::move(stretch), /*is_again=*/false));
  });
  if (!is_held) again.drop(user);
  return error;
}

}  // extern "C"
