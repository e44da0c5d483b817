// Single tensors that are made again in the backward pass instead of being kept for it, wherever operations save them.
#include "saving.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/StorageImpl.h>

#include <unordered_map>
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

class Place;
using Places = std::vector<std::shared_ptr<Place>>;

// How a tensor is made.
struct Recipe {
  Recipe(Again again, void* user) : again(again, user) {}
  void make();

  Rerun again;
  Places from;
  // What is made must be like the tensor that was given away.
  at::TensorOptions options;
  std::vector<int64_t> sizes, strides;

  // Defined from the first place that asks to the last, so that all of them share it.
  at::Tensor made;
  // How often it was made.
  uint64_t n_made = 0;
  // Places, and those of them that have not got what was made last.
  size_t n_places = 0, n_waiting = 0;
};

// Where a tensor is kept, or is made again. The tensor has no history, which may lead back here.
class Place {
 public:
  explicit Place(const at::Tensor& tensor) : tensor_(tensor.detach()), version_(tensor._version()) {}
  ~Place() {
    if (recipe_ == nullptr) return;
    --recipe_->n_places;
    if (recipe_->made.defined() && n_got_ != recipe_->n_made) has_got();
  }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  // Gives the tensor away. It is `recipe`'s or a view of that; as a view of another type it stays.
  void follow(std::shared_ptr<Recipe> recipe) {
    if (recipe_ != nullptr || tensor_.dtype() != recipe->options.dtype()) return;
    recipe_ = std::move(recipe);
    ++recipe_->n_places;
    if (recipe_->made.defined()) ++recipe_->n_waiting;
    sizes_ = tensor_.sizes().vec();
    strides_ = tensor_.strides().vec();
    offset_ = tensor_.storage_offset();
    tensor_.reset();
  }

  at::Tensor get() {
    if (recipe_ == nullptr) {
      TORCH_CHECK(tensor_._version() == version_, "a tensor ", tensor_.sizes(), " of ", tensor_.scalar_type(),
                  " that the backward pass needs has been changed in place");
      return tensor_;
    }
    if (!recipe_->made.defined() || n_got_ == recipe_->n_made) recipe_->make();
    n_got_ = recipe_->n_made;
    const at::Tensor made = recipe_->made;
    has_got();
    return made.sizes() == sizes_ && made.strides() == strides_ ? made : made.as_strided(sizes_, strides_, offset_);
  }

 private:
  void has_got() {
    if (--recipe_->n_waiting == 0) recipe_->made.reset();
  }

  at::Tensor tensor_;
  int64_t version_;
  std::shared_ptr<Recipe> recipe_;
  std::vector<int64_t> sizes_, strides_;
  int64_t offset_ = 0;
  uint64_t n_got_ = 0;
};

void Recipe::make() {
  const at::NoGradGuard no_grad;
  List given;
  for (const auto& place : from) given.push_back(place->get());
  auto again_made = again(given);
  TORCH_CHECK(again_made.size() == 1 && again_made[0].defined(), "a tensor was not made again");
  const auto& is = again_made[0];
  TORCH_CHECK(is.dtype() == options.dtype() && is.device() == options.device() && is.sizes() == sizes,
              "a tensor that was made again is ", is.scalar_type(), " ", is.sizes(), ", at first it was ",
              options.dtype(), " ", at::IntArrayRef(sizes));
  made = is.strides() == strides && is.storage_offset() == 0 ? is.detach()
                                                             : at::empty_strided(sizes, strides, options).copy_(is);
  ++n_made;
  n_waiting = n_places;
}

// What was saved since it began, by memory.
class Ledger : public Saver {
 public:
  explicit Ledger(bool is_frugal) : is_frugal(is_frugal) {}
  // Whether tensors may be given away.
  const bool is_frugal;

  std::unique_ptr<SavedVariableHooks> hook() override;
  void saw(const at::Tensor& tensor) override {
    if (tensor.has_storage()) entry(tensor);
  }

  std::shared_ptr<Place> keep(const at::Tensor& tensor) {
    Saving::tell(tensor);
    auto place = std::make_shared<Place>(tensor);
    if (tensor.has_storage()) {
      auto& of_memory = entry(tensor);
      if (of_memory.recipe == nullptr) {
        of_memory.places.push_back(place);
      } else {
        place->follow(of_memory.recipe);
      }
    }
    return place;
  }

  void give_away(const at::Tensor& tensor, std::shared_ptr<Recipe> recipe) {
    auto& of_memory = entry(tensor);
    if (of_memory.recipe != nullptr) return;
    of_memory.recipe = std::move(recipe);
    for (const auto& weak : std::exchange(of_memory.places, {})) {
      if (const auto place = weak.lock()) place->follow(of_memory.recipe);
    }
  }

  size_t bytes_alive() const {
    size_t n = 0;
    for (const auto& [_, of_memory] : entries_) {
      if (const auto storage = of_memory.storage.lock()) n += storage->nbytes();
    }
    return n;
  }

 private:
  struct Entry {
    // While it is there, no other storage has this one's address.
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    std::vector<std::weak_ptr<Place>> places;
    std::shared_ptr<Recipe> recipe;
  };

  Entry& entry(const at::Tensor& tensor) {
    const auto& storage = tensor.storage();
    return entries_.try_emplace(storage.unsafeGetStorageImpl(), Entry{storage.getWeakStorageImpl(), {}, nullptr})
        .first->second;
  }

  std::unordered_map<const c10::StorageImpl*, Entry> entries_;
};

// A saved tensor.
class Saved : public SavedVariableHooks {
 public:
  explicit Saved(Ledger* ledger) : ledger_(ledger) {}
  // libtorch calls it at once, so the ledger is there.
  void call_pack_hook(const at::Tensor& tensor) override { place_ = std::exchange(ledger_, nullptr)->keep(tensor); }
  at::Tensor call_unpack_hook() override { return place_->get(); }

 private:
  Ledger* ledger_;
  std::shared_ptr<Place> place_;
};

std::unique_ptr<SavedVariableHooks> Ledger::hook() { return std::make_unique<Saved>(this); }

// Whether all of its memory is the tensor's own, so that a view of it finds in what is made all that it shows.
bool is_whole(const at::Tensor& tensor) {
  return tensor.has_storage() && tensor.storage_offset() == 0 && tensor.is_non_overlapping_and_dense() &&
         tensor.storage().nbytes() == tensor.nbytes();
}

}  // namespace

extern "C" {

// Begins a scope of this thread, in which tensors can be given away if it `is_frugal`.
char* moeut_frugal_begin(bool is_frugal, Saving** saving) {
  return guard([&] { checked(saving, "saving") = new Saving(std::make_shared<Ledger>(is_frugal)); });
}

// Begins a scope that only counts; the ledger outlives it.
char* moeut_count_begin(std::shared_ptr<Ledger>** ledger, Saving** saving) {
  return guard([&] {
    auto made = std::make_unique<std::shared_ptr<Ledger>>(std::make_shared<Ledger>(/*is_frugal=*/false));
    checked(saving, "saving") = new Saving(*made);
    checked(ledger, "ledger") = made.release();
  });
}

// Bytes of all memory with tensors saved in the ledger's scope that is still in use, whoever uses it.
size_t moeut_count_bytes(const std::shared_ptr<Ledger>* ledger) { return (*ledger)->bytes_alive(); }

void moeut_count_free(std::shared_ptr<Ledger>* ledger) { delete ledger; }

// Gives `tensor` away, which `again` makes from `from`, if a scope of this thread allows it. What shares memory with its
// origin, or with something that is no part of it, stays. Takes ownership of `user`, whatever happens.
char* moeut_frugal_give_away(const at::Tensor* tensor, const List* from, Again again, void* user) {
  bool is_held = false;
  char* error = guard([&] {
    auto recipe = std::make_shared<Recipe>(again, user);
    is_held = true;
    auto* ledger = dynamic_cast<Ledger*>(Saving::current());
    const auto& given = checked(tensor, "tensor");
    moeut::check_defined({given}, "tensor");
    moeut::check_defined(checked(from, "from"), "from");
    if (ledger == nullptr || !ledger->is_frugal || !is_whole(given)) return;
    recipe->options = given.options();
    recipe->sizes = given.sizes().vec();
    recipe->strides = given.strides().vec();
    for (const auto& one : *from) {
      if (one.has_storage() && one.storage().is_alias_of(given.storage())) return;
      recipe->from.push_back(ledger->keep(one));
    }
    ledger->give_away(given, std::move(recipe));
  });
  if (!is_held) again.drop(user);
  return error;
}

}  // extern "C"
