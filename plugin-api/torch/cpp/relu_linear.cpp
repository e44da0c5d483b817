// A product to whose results cuBLAS adds a bias and applies a ReLU before it writes them. Its library comes with libtorch's
// CUDA half and is found in the process at run time.
//
// cuBLAS stores columns one after the other, so a matrix that is stored by rows is its transpose. Numbers are those of
// cublasLt.h, whose ABI is the same in CUDA 12 and 13.
#include "guard.h"
#include "lookup.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/ops/empty.h>

using moeut::List;
using moeut::checked;
using moeut::find;
using moeut::guard;

namespace {

constexpr int TYPE_F32 = 0, TYPE_F16 = 2, TYPE_BF16 = 14, COMPUTE_F32 = 68;
constexpr int TRANSA = 3, EPILOGUE = 7, BIAS_POINTER = 8, BIAS_TYPE = 26;
constexpr int OP_T = 1, RELU_BIAS = 2 | 4;
constexpr int MAX_WORKSPACE_BYTES = 1;
constexpr int64_t WORKSPACE_BYTES = 32 << 20;

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_size;
  int state;
  float waves;
  int reserved[4];
};

void check_status(int status, const char* function) {
  TORCH_CHECK(status == 0, function, " of cuBLAS fails with status ", status);
}

// A description that the library makes and destroys.
class Made {
 public:
  template <typename... Args>
  Made(const char* create, const char* destroy, Args... args) : destroy_(find<int (*)(void*)>(destroy)) {
    check_status(find<int (*)(void**, Args...)>(create)(&object_, args...), create);
  }
  ~Made() { destroy_(object_); }
  Made(const Made&) = delete;
  Made& operator=(const Made&) = delete;

  template <typename Value>
  void set(const char* function, int attribute, Value value) {
    const auto set = find<int (*)(void*, int, const void*, size_t)>(function);
    check_status(set(object_, attribute, &value, sizeof value), function);
  }
  void* get() const { return object_; }

 private:
  void* object_ = nullptr;
  int (*destroy_)(void*);
};

// `n_rows` columns of `width` numbers.
struct Layout : Made {
  Layout(int type, int64_t width, int64_t n_rows)
      : Made("cublasLtMatrixLayoutCreate", "cublasLtMatrixLayoutDestroy", type, uint64_t(width), uint64_t(n_rows), width) {}
};

// y [N, S] = relu(x [N, D] · wᵀ + b) for w [S, D], b [S].
void multiply(const at::Tensor& x, const at::Tensor& w, const at::Tensor& b, const at::Tensor& y) {
  const int type = y.scalar_type() == at::kHalf ? TYPE_F16 : TYPE_BF16;
  Made product("cublasLtMatmulDescCreate", "cublasLtMatmulDescDestroy", COMPUTE_F32, TYPE_F32);
  const char* set = "cublasLtMatmulDescSetAttribute";
  product.set(set, TRANSA, OP_T);
  product.set(set, EPILOGUE, RELU_BIAS);
  product.set(set, BIAS_POINTER, b.data_ptr());
  product.set(set, BIAS_TYPE, type);
  const auto layout = [type](const at::Tensor& of) { return Layout(type, of.size(1), of.size(0)); };
  const auto of_x = layout(x), of_w = layout(w), of_y = layout(y);
  Made preference("cublasLtMatmulPreferenceCreate", "cublasLtMatmulPreferenceDestroy");
  preference.set("cublasLtMatmulPreferenceSetAttribute", MAX_WORKSPACE_BYTES, uint64_t(WORKSPACE_BYTES));

  void* handle = find<void* (*)()>("_ZN2at4cuda26getCurrentCUDABlasLtHandleEv")();
  Heuristic found;
  int n_found = 0;
  const char* choose = "cublasLtMatmulAlgoGetHeuristic";
  check_status(find<int (*)(void*, void*, void*, void*, void*, void*, void*, int, Heuristic*, int*)>(choose)(
                   handle, product.get(), of_w.get(), of_x.get(), of_y.get(), of_y.get(), preference.get(), 1, &found,
                   &n_found),
               choose);
  TORCH_CHECK(n_found > 0, "cuBLAS has no product of ", y.size(0), " x ", y.size(1), " results that ends with a ReLU");
  const auto workspace = at::empty({WORKSPACE_BYTES}, y.options().dtype(at::kByte));
  const float one = 1, zero = 0;
  const char* run = "cublasLtMatmul";
  check_status(find<int (*)(void*, void*, const float*, const void*, void*, const void*, void*, const float*,
                            const void*, void*, void*, void*, const Algorithm*, void*, size_t, void*)>(run)(
                   handle, product.get(), &one, w.data_ptr(), of_w.get(), x.data_ptr(), of_x.get(), &zero, y.data_ptr(),
                   of_y.get(), y.data_ptr(), of_y.get(), &found.algorithm, workspace.data_ptr(), WORKSPACE_BYTES,
                   at::accelerator::getCurrentStream(y.device().index()).native_handle()),
               run);
}

const at::Tensor& checked_matrix(const at::Tensor* matrix, const char* name, int64_t dim, const at::Tensor& like) {
  const auto& tensor = checked(matrix, name);
  TORCH_CHECK(tensor.defined() && tensor.dim() == dim && tensor.is_contiguous() && tensor.is_cuda() &&
                  (tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16) &&
                  tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(),
              "`", name, "` must be contiguous, of 16 bits, and where and what the first operand is");
  return tensor;
}

}  // namespace

extern "C" {

char* moeut_relu_linear(const at::Tensor* x_nd, const at::Tensor* w_sd, const at::Tensor* b_s, List* result) {
  return guard([&] {
    const auto& x = checked_matrix(x_nd, "x", 2, checked(x_nd, "x"));
    const auto& w = checked_matrix(w_sd, "w", 2, x);
    const auto& b = checked_matrix(b_s, "b", 1, x);
    TORCH_CHECK(w.size(1) == x.size(1) && b.size(0) == w.size(0), "the widths do not fit");
    const auto y = at::empty({x.size(0), w.size(0)}, x.options());
    multiply(x, w, b, y);
    checked(result, "result") = {y};
  });
}
}
