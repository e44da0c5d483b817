// Groups of GPUs: c10d's ProcessGroupNCCL, which lives in libtorch_cuda.so and is found there at run time.
//
// Its header wants NCCL's and half of CUDA's; nothing of it is needed. Everything but construction goes through virtual
// functions of `c10d::Backend`, which libtorch_cpu.so declares. The two constructors are looked up by the name that the
// ABI gives them. An object's size is not known from here, so both are built in storage that is far larger than they
// are, never deleted by a reference count, and destroyed in place.
//
// Sizes in libtorch 2.11.0+cu130, from the number that the deleting destructors (`_ZN4c10d16ProcessGroupNCCLD0Ev`,
// `_ZN4c10d16ProcessGroupNCCL7OptionsD0Ev`) pass to `operator delete`, read with `objdump -d`: the group 0x458 = 1,112
// bytes, its options 0xf8 = 248 bytes. `ProcessGroupNCCL::merge` allocates the same 0x458, and the options' constructor,
// called on a buffer of a known pattern, writes the bytes 0 to 243. Both derive first and only from `c10d::Backend` and
// `c10d::Backend::Options`, so a pointer to one is a pointer to its base.
#include "c10d.h"

#include <torch/version.h>

#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>

static_assert(TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR == 11,
              "check the constructors and sizes of ProcessGroupNCCL in this version of libtorch, then name it here");

using moeut::Group;
using moeut::Store;
using moeut::Text;
using moeut::Work;
using moeut::checked;
using moeut::guard;

namespace {

using BackendOptions = c10d::Backend::Options;
// Counted pointers cross by reference whatever they point to, so the bases stand for the classes.
using NewOptions = void (*)(void* storage, bool is_high_priority_stream);
using NewGroup = void (*)(void* storage, c10::intrusive_ptr<c10d::Store> store, int rank, int n_ranks,
                          c10::intrusive_ptr<BackendOptions> options);

constexpr const char* kNewOptions = "_ZN4c10d16ProcessGroupNCCL7OptionsC1Eb";
constexpr const char* kNewGroup =
    "_ZN4c10d16ProcessGroupNCCLC1EN3c1013intrusive_ptrINS_5StoreENS1_6detail34intrusive_target_default_null_"
    "typeIS3_EEEEiiNS2_INS0_7OptionsENS5_IS8_EEEE";

void* find(const char* symbol) {
  void* address = dlsym(RTLD_DEFAULT, symbol);
  TORCH_CHECK(address != nullptr, "NCCL belongs to libtorch's CUDA libraries, which are not loaded in this process");
  return address;
}

// An object of a class derived from `Base` whose size is known to be far below `n_bytes`.
template <typename Base, size_t n_bytes>
class InPlace {
 public:
  template <typename Build>
  explicit InPlace(Build&& build) {
    build(storage_);
    object_ = reinterpret_cast<Base*>(storage_);
    shared_ = c10::intrusive_ptr<Base>::unsafe_adapt_non_heap_allocated(object_, /*expected_decrefs=*/1);
  }
  InPlace(const InPlace&) = delete;
  InPlace& operator=(const InPlace&) = delete;
  ~InPlace() {
    (void)shared_.release();  // the count lies in the object
    object_->~Base();
  }

  Base& operator*() const { return *object_; }
  const c10::intrusive_ptr<Base>& shared() const { return shared_; }

 private:
  alignas(std::max_align_t) std::byte storage_[n_bytes];
  Base* object_;
  c10::intrusive_ptr<Base> shared_;
};

class NcclGroup : public Group {
 public:
  NcclGroup(c10::intrusive_ptr<c10d::Store> store, int rank, int n_ranks, std::chrono::milliseconds timeout,
            at::Device device)
      : Group(device),
        options_([&](void* storage) {
          // A stream of high priority: a bucket that is ready travels before the rest of backward has run.
          reinterpret_cast<NewOptions>(find(kNewOptions))(storage, /*is_high_priority_stream=*/true);
        }),
        nccl_([&](void* storage) {
          (*options_).timeout = timeout;
          reinterpret_cast<NewGroup>(find(kNewGroup))(storage, std::move(store), rank, n_ranks, options_.shared());
        }) {
    (*nccl_).setBoundDeviceId(device);
  }

  ~NcclGroup() override {
    // A communicator that failed cannot say goodbye to its peers; one that works does, so that none of them fails.
    if (is_aborted_) return;
    std::free(guard([&] { has_failed() ? (*nccl_).abort() : (*nccl_).shutdown(); }));
  }

  c10d::Backend& backend() override { return *nccl_; }

  Work reduce_scatter(at::Tensor part, at::Tensor whole) override {
    return {{(*nccl_)._reduce_scatter_base(part, whole)}, {}};
  }

  void abort() override {
    if (!is_aborted_.exchange(true)) (*nccl_).abort();
  }

  bool has_failed() override { return (*nccl_).getError() != c10d::ErrorType::SUCCESS; }

 private:
  InPlace<BackendOptions, 4096> options_;
  InPlace<c10d::Backend, 16384> nccl_;
  std::atomic<bool> is_aborted_{false};
};

}  // namespace

extern "C" {

char* moeut_c10d_nccl_new(const Store* store, Text prefix, int rank, int n_ranks, uint64_t timeout_ms, int device,
                          Group** group) {
  return guard([&] {
    const auto on = moeut::device_of(device);
    TORCH_CHECK(on.is_cuda(), "NCCL connects GPUs, not the CPU");
    find(kNewGroup);
    // What the watchdog sees go wrong comes back as no more than a code; it prints the rest.
    moeut::print_from(moeut::kErrors);
    const auto timeout = moeut::milliseconds(timeout_ms);
    checked(group, "group") =
        new NcclGroup(checked(store, "store").connect(prefix, timeout), rank, n_ranks, timeout, on);
  });
}

}  // extern "C"
