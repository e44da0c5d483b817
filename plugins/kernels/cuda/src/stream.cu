// The kernels of the residual stream: addition, rounding and layer normalization in one pass over a row, and rotary
// positions. Rows of the stream are in fp32, what layers read of it and add to it in the element type of the module.

// ---------------------------------------------------------------------------------------------------------------------
// Pieces of a row: W elements that a thread reads or writes at once
// ---------------------------------------------------------------------------------------------------------------------

template <int W>
__device__ __forceinline__ void load_piece(float (&values)[W], const float* from) {
  if constexpr (W % 4 == 0) {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < W; i++) values[i] = from[i];
  }
}

template <int W>
__device__ __forceinline__ void load_piece(float (&values)[W], const u16* from) {
  if constexpr (W % 4 == 0) {
    u32 pairs[W / 2];
    if constexpr (W == 8) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      pairs[0] = four.x, pairs[1] = four.y, pairs[2] = four.z, pairs[3] = four.w;
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      pairs[0] = two.x, pairs[1] = two.y;
    }
#pragma unroll
    for (int i = 0; i < W / 2; i++) {
      const float2 pair = unpack(pairs[i]);
      values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < W; i++) values[i] = unpack(from[i]).x;
  }
}

template <int W>
__device__ __forceinline__ void store_piece(float* to, const float (&values)[W]) {
  if constexpr (W % 4 == 0) {
#pragma unroll
    for (int i = 0; i < W; i += 4)
      *reinterpret_cast<float4*>(to + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < W; i++) to[i] = values[i];
  }
}

template <int W>
__device__ __forceinline__ void store_piece(u16* to, const float (&values)[W]) {
  if constexpr (W == 8) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack(values[0], values[1]), pack(values[2], values[3]),
                                               pack(values[4], values[5]), pack(values[6], values[7]));
  } else if constexpr (W == 4) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack(values[0], values[1]), pack(values[2], values[3]));
  } else {
#pragma unroll
    for (int i = 0; i < W; i++) to[i] = u16(pack(values[i], 0.f));
  }
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// ---------------------------------------------------------------------------------------------------------------------
// Layer normalization
// ---------------------------------------------------------------------------------------------------------------------

struct Norm {
  // [n_rows, pitch], of which a row's first `width` channels are normalized, and `normed` is 0 in the others; `update` and
  // with it `sum` may be null. Without `x`, a stream that is rounded already is in `plain`, where it stays.
  const float* x;
  const u16* update;
  float* sum;
  u16* plain;
  // In fp32 if `is_wide`.
  void* normed;
  // [pitch], 0 behind the first `width`.
  const float* weight;
  const float* bias;
  // [n_rows]
  float* means;
  float* scales;
  // Gradients of the results, each of which may be null, and of the inputs; `update_grads` may be null, too.
  const float* sum_grads;
  const u16* plain_grads;
  const void* normed_grads;
  float* x_grads;
  u16* update_grads;
  // [n_blocks, 2, pitch]: each block's sums for the gradients of weight and bias.
  float* parts;
  i64 n_rows;
  int width, pitch, is_wide, rows_per_block;
  float eps;
};

// sum = x (+ update),  plain = rounded(sum),  normed = (sum - mean) · scale · weight + bias; one warp for each row
template <int W>
__device__ __forceinline__ void norm_rows(const Norm& p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 row = i64(blockIdx.x) * (blockDim.x >> 5) + warp;
  if (row >= p.n_rows) return;
  float* kept = reinterpret_cast<float*>(shared_memory) + warp * p.pitch;
  const i64 first = row * p.pitch;
  float total = 0.f;
#pragma unroll 4
  for (int at = lane * W; at < p.pitch; at += 32 * W) {
    float values[W];
    if (p.x == nullptr) {
      load_piece(values, p.plain + first + at);
    } else {
      load_piece(values, p.x + first + at);
      if (p.update != nullptr) {
        float update[W];
        load_piece(update, p.update + first + at);
#pragma unroll
        for (int i = 0; i < W; i++) values[i] += update[i];
        store_piece(p.sum + first + at, values);
      }
      store_piece(p.plain + first + at, values);
    }
    store_piece(kept + at, values);
#pragma unroll
    for (int i = 0; i < W; i++) total += at + i < p.width ? values[i] : 0.f;
  }
  const float mean = warp_sum(total) / p.width;
  float squares = 0.f;
  for (int at = lane * W; at < p.pitch; at += 32 * W) {
    float values[W];
    load_piece(values, kept + at);
#pragma unroll
    for (int i = 0; i < W; i++) squares += at + i < p.width ? (values[i] - mean) * (values[i] - mean) : 0.f;
  }
  const float scale = rsqrtf(warp_sum(squares) / p.width + p.eps);
  if (lane == 0) p.means[row] = mean, p.scales[row] = scale;
#pragma unroll 4
  for (int at = lane * W; at < p.pitch; at += 32 * W) {
    float values[W], weight[W], bias[W];
    load_piece(values, kept + at);
    load_piece(weight, p.weight + at);
    load_piece(bias, p.bias + at);
#pragma unroll
    for (int i = 0; i < W; i++) values[i] = (values[i] - mean) * scale * weight[i] + bias[i];
    if (p.is_wide) {
      store_piece(static_cast<float*>(p.normed) + first + at, values);
    } else {
      store_piece(static_cast<u16*>(p.normed) + first + at, values);
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) normalize(const __grid_constant__ Norm p) { norm_rows<4>(p); }
extern "C" __global__ void __launch_bounds__(256) normalize_odd(const __grid_constant__ Norm p) { norm_rows<1>(p); }

// With n = (plain - mean) · scale, g the gradient of `normed` and h = g · weight:
//
//   x_grads = scale · (h - mean(h) - n · mean(h · n)) + plain_grads + sum_grads,   update_grads the same, rounded
//   parts = Σ g · n, Σ g over the rows of the block, in one fixed order
template <int W>
__device__ __forceinline__ void norm_rows_backward(const Norm& p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
  float* weight_sums = reinterpret_cast<float*>(shared_memory) + warp * 2 * p.pitch;
  float* bias_sums = weight_sums + p.pitch;
  for (int at = lane; at < 2 * p.pitch; at += 32) weight_sums[at] = 0.f;
  __syncwarp();
  const auto load_grad = [&](float(&grad)[W], i64 at) {
    if (p.is_wide) {
      load_piece(grad, static_cast<const float*>(p.normed_grads) + at);
    } else {
      load_piece(grad, static_cast<const u16*>(p.normed_grads) + at);
    }
  };
  const i64 row0 = i64(blockIdx.x) * p.rows_per_block;
  const i64 end = min(row0 + p.rows_per_block, p.n_rows);
  for (i64 row = row0 + warp; row < end; row += n_warps) {
    const i64 first = row * p.pitch;
    const float mean = p.means[row], scale = p.scales[row];
    float of_grad = 0.f, of_product = 0.f;
    if (p.normed_grads != nullptr) {
#pragma unroll 4
      for (int at = lane * W; at < p.pitch; at += 32 * W) {
        float grad[W], plain[W], weight[W], weight_sum[W], bias_sum[W];
        load_grad(grad, first + at);
        load_piece(plain, p.plain + first + at);
        load_piece(weight, p.weight + at);
        load_piece(weight_sum, weight_sums + at);
        load_piece(bias_sum, bias_sums + at);
#pragma unroll
        for (int i = 0; i < W; i++) {
          const float normed = (plain[i] - mean) * scale;
          weight_sum[i] += grad[i] * normed;
          bias_sum[i] += grad[i];
          of_grad += grad[i] * weight[i];
          of_product += grad[i] * weight[i] * normed;
        }
        store_piece(weight_sums + at, weight_sum);
        store_piece(bias_sums + at, bias_sum);
      }
      of_grad = warp_sum(of_grad) / p.width;
      of_product = warp_sum(of_product) / p.width;
    }
#pragma unroll 4
    for (int at = lane * W; at < p.pitch; at += 32 * W) {
      float result[W] = {};
      if (p.normed_grads != nullptr) {
        float grad[W], plain[W], weight[W];
        load_grad(grad, first + at);
        load_piece(plain, p.plain + first + at);
        load_piece(weight, p.weight + at);
#pragma unroll
        for (int i = 0; i < W; i++) {
          const float normed = (plain[i] - mean) * scale;
          if (at + i < p.width) result[i] = scale * (grad[i] * weight[i] - of_grad - normed * of_product);
        }
      }
      float other[W];
      if (p.plain_grads != nullptr) {
        load_piece(other, p.plain_grads + first + at);
#pragma unroll
        for (int i = 0; i < W; i++) result[i] += other[i];
      }
      if (p.sum_grads != nullptr) {
        load_piece(other, p.sum_grads + first + at);
#pragma unroll
        for (int i = 0; i < W; i++) result[i] += other[i];
      }
      store_piece(p.x_grads + first + at, result);
      if (p.update_grads != nullptr) store_piece(p.update_grads + first + at, result);
    }
  }
  __syncthreads();
  const float* sums = reinterpret_cast<const float*>(shared_memory);
  for (int at = threadIdx.x; at < 2 * p.pitch; at += blockDim.x) {
    float sum = 0.f;
    for (int w = 0; w < n_warps; w++) sum += sums[w * 2 * p.pitch + at];
    p.parts[i64(blockIdx.x) * 2 * p.pitch + at] = sum;
  }
}

extern "C" __global__ void __launch_bounds__(256) normalize_backward(const __grid_constant__ Norm p) {
  norm_rows_backward<4>(p);
}
extern "C" __global__ void __launch_bounds__(256) normalize_backward_odd(const __grid_constant__ Norm p) {
  norm_rows_backward<1>(p);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rotary positions
// ---------------------------------------------------------------------------------------------------------------------

struct Rotation {
  // [.., seq_len, n_heads, d_head]
  const u16* x;
  u16* y;
  // [seq_len, n_angles]
  const float* cos;
  const float* sin;
  // Heads of all tokens.
  i64 n_rows;
  int seq_len, n_heads, d_head, n_angles;
  // 1, or -1 for the way back.
  float direction;
};

// One thread for a piece of W channels; with IS_WHOLE both halves of the rotated channels are whole pieces.
template <int W, bool IS_WHOLE>
__device__ __forceinline__ void rotate_pieces(const Rotation& p) {
  // There are fewer pieces than 2³², so that divisions are short.
  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const u32 n_pieces = p.d_head / W, row = index / n_pieces;
  if (row >= p.n_rows) return;
  const int at = int(index % n_pieces) * W;
  const i64 first = i64(row) * p.d_head;
  float values[W];
  load_piece(values, p.x + first + at);
  if (at < 2 * p.n_angles) {
    const i64 angle0 = i64(row / u32(p.n_heads) % u32(p.seq_len)) * p.n_angles;
    if constexpr (IS_WHOLE) {
      const bool is_second = at >= p.n_angles;
      const int angle = is_second ? at - p.n_angles : at;
      const float direction = is_second ? p.direction : -p.direction;
      float others[W], cos[W], sin[W];
      load_piece(others, p.x + first + (is_second ? angle : at + p.n_angles));
      load_piece(cos, p.cos + angle0 + angle);
      load_piece(sin, p.sin + angle0 + angle);
#pragma unroll
      for (int i = 0; i < W; i++) values[i] = values[i] * cos[i] + direction * others[i] * sin[i];
    } else {
#pragma unroll
      for (int i = 0; i < W; i++) {
        if (at + i >= 2 * p.n_angles) break;
        const bool is_second = at + i >= p.n_angles;
        const int angle = is_second ? at + i - p.n_angles : at + i;
        const float direction = is_second ? p.direction : -p.direction;
        const float other = unpack(p.x[first + (is_second ? angle : angle + p.n_angles)]).x;
        values[i] = values[i] * p.cos[angle0 + angle] + direction * other * p.sin[angle0 + angle];
      }
    }
  }
  store_piece(p.y + first + at, values);
}

extern "C" __global__ void __launch_bounds__(256) rotate(const __grid_constant__ Rotation p) {
  rotate_pieces<8, true>(p);
}
extern "C" __global__ void __launch_bounds__(256) rotate_split(const __grid_constant__ Rotation p) {
  rotate_pieces<8, false>(p);
}
extern "C" __global__ void __launch_bounds__(256) rotate_odd(const __grid_constant__ Rotation p) {
  rotate_pieces<1, false>(p);
}
