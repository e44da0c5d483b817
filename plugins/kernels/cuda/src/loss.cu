// The loss of next-token prediction and its gradient: one warp for each row of logits, which is read once in either
// pass. Nothing of the size of the logits exists but they and their gradient.

struct Losses {
  // [n_rows, width] without gaps, from an aligned address on.
  const u16* logits;
  // [n_rows]: an id, or less than 0 where there is no loss.
  const i64* targets;
  float* losses;
  // The largest logit of a row, and Σ exp(logit - largest): two numbers, because the logarithm of the sum would be lost
  // beside a large logit.
  float* largest;
  float* sums;
  // Gradients of the losses and of the logits; the latter lie as the logits do.
  const float* loss_grads;
  u16* logit_grads;
  i64 n_rows;
  int width;
};

// Elements of a piece, and pieces that a lane reads before it looks at the first of them.
constexpr int LOGITS = 8;
constexpr int N_AT_ONCE = 4;
constexpr float LOWEST = -3.402823466e38f;

// Calls `visit` with the lane's parts of a row and their places. Rows of an odd width begin anywhere: what lies before
// the first aligned address and behind the last whole piece is left to one lane each.
template <typename Visit>
__device__ __forceinline__ void each_part(const u16* row, int width, const Visit& visit) {
  const int lane = threadIdx.x & 31;
  const int n_before = min(int(-reinterpret_cast<i64>(row) & 15) / 2, width);
  const int n_pieces = (width - n_before) / LOGITS;
  for (int first = lane; first < n_pieces; first += 32 * N_AT_ONCE) {
    uint4 pieces[N_AT_ONCE];
#pragma unroll
    for (int i = 0; i < N_AT_ONCE; i++) {
      const int piece = first + 32 * i;
      if (piece < n_pieces) pieces[i] = *reinterpret_cast<const uint4*>(row + n_before + piece * LOGITS);
    }
#pragma unroll
    for (int i = 0; i < N_AT_ONCE; i++) {
      const int piece = first + 32 * i;
      if (piece >= n_pieces) break;
      float values[LOGITS];
      load_piece(values, reinterpret_cast<const u16*>(&pieces[i]));
      visit(values, n_before + piece * LOGITS);
    }
  }
  const int single = lane < n_before ? lane : lane + n_pieces * LOGITS;
  if (single < width) {
    float values[1];
    load_piece(values, row + single);
    visit(values, single);
  }
}

// Keeps `largest` and Σ exp(logit - largest) over the logits so far.
template <int W>
__device__ __forceinline__ void add_powers(float& largest, float& sum, const float (&logits)[W]) {
  float larger = largest;
#pragma unroll
  for (int i = 0; i < W; i++) larger = fmaxf(larger, logits[i]);
  sum *= __expf(largest - larger);
  largest = larger;
#pragma unroll
  for (int i = 0; i < W; i++) sum += __expf(logits[i] - larger);
}

// loss = log Σ exp(logit - largest) + (largest - logit[target])
extern "C" __global__ void __launch_bounds__(256) cross_entropy(const __grid_constant__ Losses p) {
  const int lane = threadIdx.x & 31;
  const i64 row = i64(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (row >= p.n_rows) return;
  const i64 target = p.targets[row];
  if (target < 0) {
    if (lane == 0) p.losses[row] = 0.f;
    return;
  }
  const u16* logits = p.logits + row * p.width;
  float largest = LOWEST, sum = 0.f;
  each_part(logits, p.width, [&](const auto& part, int) { add_powers(largest, sum, part); });
  const float of_row = warp_max(largest);
  sum = warp_sum(sum * __expf(largest - of_row));
  if (lane == 0) {
    // A target that is no id must not be read; its loss is not a number.
    const float logit = target < p.width ? unpack(logits[target]).x : __int_as_float(0x7fffffff);
    p.losses[row] = logf(sum) + (of_row - logit);
    p.largest[row] = of_row, p.sums[row] = sum;
  }
}

// logit_grad = (exp(logit - largest) / sum - (1 at the target)) · loss_grad
extern "C" __global__ void __launch_bounds__(256) cross_entropy_backward(const __grid_constant__ Losses p) {
  const i64 row = i64(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (row >= p.n_rows) return;
  const int target = int(min(p.targets[row], i64(p.width)));
  const bool has_target = target >= 0;
  const float grad = p.loss_grads[row];
  const float largest = has_target ? p.largest[row] : 0.f;
  const float factor = has_target ? grad / p.sums[row] : 0.f;
  u16* grads = p.logit_grads + row * p.width;
  each_part(p.logits + row * p.width, p.width, [&](auto& part, int at) {
    constexpr int W = sizeof(part) / sizeof(float);
#pragma unroll
    for (int i = 0; i < W; i++) part[i] = has_target ? __expf(part[i] - largest) * factor : 0.f;
    if (at <= target && target < at + W) {
#pragma unroll
      for (int i = 0; i < W; i++) part[i] -= at + i == target ? grad : 0.f;
    }
    store_piece(grads + at, part);
  });
}
