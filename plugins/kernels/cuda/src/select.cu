// The kernels of routing: from router logits to gates, to selections in the order of the experts, and to the mean
// probability of each expert. Tokens come in *chunks*, at most 128 neighbors of one sequence: a bit mask for each expert
// says which of them selected it, so that the place of a selection among those of its expert is a count of bits. All
// sums have one fixed order.

constexpr int CHUNK = 128;
constexpr int MASK_WORDS = CHUNK / 32;
constexpr int SELECT_WARPS = 8;

struct Selection {
  // [n_tokens, pitch], of which a row's first n_groups · n_experts are logits.
  const float* logits;
  // By selection.
  int* ids;
  float* gates;
  // By token and group: log Σ exp(logit).
  float* log_sums;
  // [n_chunks, n_groups · n_experts]: Σ softmax(logits) over the tokens of the chunk; or null.
  float* parts;
  // [n_chunks, n_groups · n_experts] masks, and [n_groups · n_experts, n_chunks] numbers of selections, which
  // `scan_chunks` turns into those in earlier chunks.
  uint4* masks;
  int* counts;
  // By expert: all its selections, and where they end in the sorted order.
  int* totals;
  int* ends;
  i64* order;
  i64* inverse;
  // `select_backward`: gradients of the gates, or null; [n_sequences, n_groups · n_experts] gradients of a token's
  // probabilities, or null; and of the logits, [n_tokens, pitch], in fp32 if `is_wide`.
  const float* gate_grads;
  const float* probability_grads;
  void* logit_grads;
  i64 n_tokens;
  int pitch, seq_len, chunks_per_sequence, n_groups, n_experts, top_k, is_wide;
};

// Numbers whose order is that of the logits; 0 is left for what cannot be selected.
__device__ __forceinline__ u32 sortable(float logit) {
  const u32 bits = __float_as_uint(logit);
  return max(bits & 0x80000000u ? ~bits : bits | 0x80000000u, 1u);
}

__device__ __forceinline__ float warp_max(float value) {
  for (int distance = 16; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// The largest of this lane's keys, the first one if there are several.
template <int C>
__device__ __forceinline__ void largest_key(const u32 (&keys)[C], u32& key, int& column) {
  key = keys[0], column = 0;
#pragma unroll
  for (int c = 1; c < C; c++) {
    if (keys[c] > key) key = keys[c], column = c;
  }
}

// One block for each chunk, one warp for each token and group; a lane has C columns, and keeps one of the selections, of
// which there are at most 32.
template <int C>
__device__ __forceinline__ void select_experts(const Selection& p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int n_ids = p.n_groups * p.n_experts, n_chunks = gridDim.x;
  const int sequence = blockIdx.x / p.chunks_per_sequence;
  const int token0 = blockIdx.x % p.chunks_per_sequence * CHUNK;
  const int n_tokens = min(CHUNK, p.seq_len - token0);
  u32* masks = reinterpret_cast<u32*>(shared_memory);
  float* sums = reinterpret_cast<float*>(masks + n_ids * MASK_WORDS);
  for (int at = threadIdx.x; at < n_ids * MASK_WORDS; at += blockDim.x) masks[at] = 0;
  __syncthreads();

  for (int group = 0; group < p.n_groups; group++) {
    float of_column[C] = {};
    for (int local = warp; local < n_tokens; local += SELECT_WARPS) {
      const i64 token = i64(sequence) * p.seq_len + token0 + local;
      const i64 row = token * p.n_groups + group;
      const float* logits = p.logits + token * p.pitch + group * p.n_experts;
      float z[C];
      float largest = -__int_as_float(0x7f800000);
#pragma unroll
      for (int c = 0; c < C; c++) {
        const int expert = lane + 32 * c;
        z[c] = expert < p.n_experts ? logits[expert] : -__int_as_float(0x7f800000);
        largest = fmaxf(largest, z[c]);
      }
      largest = warp_max(largest);
      float powers[C], sum = 0.f;
#pragma unroll
      for (int c = 0; c < C; c++) {
        powers[c] = lane + 32 * c < p.n_experts ? __expf(z[c] - largest) : 0.f;
        sum += powers[c];
      }
      sum = warp_sum(sum);
      if (lane == 0) p.log_sums[row] = largest + logf(sum);
      const float scale = 1.f / sum;
#pragma unroll
      for (int c = 0; c < C; c++) of_column[c] += powers[c] * scale;

      u32 keys[C];
#pragma unroll
      for (int c = 0; c < C; c++) keys[c] = lane + 32 * c < p.n_experts ? sortable(z[c]) : 0;
      u32 key;
      int column;
      largest_key(keys, key, column);
      int own = 0;
      for (int j = 0; j < p.top_k; j++) {
        const u32 best = __reduce_max_sync(0xffffffffu, key);
        const int expert = __reduce_min_sync(0xffffffffu, key == best ? lane + 32 * column : 0x7fffffff);
        if (lane == j) own = expert;
        if (lane == (expert & 31)) {
#pragma unroll
          for (int c = 0; c < C; c++) {
            if (c == column) keys[c] = 0;
          }
          largest_key(keys, key, column);
        }
      }
      if (lane < p.top_k) {
        const i64 selection = row * p.top_k + lane;
        const int id = group * p.n_experts + own;
        p.ids[selection] = id;
        p.gates[selection] = 1.f / (1.f + __expf(-logits[own]));
        atomicOr(&masks[id * MASK_WORDS + local / 32], 1u << (local & 31));
      }
    }
#pragma unroll
    for (int c = 0; c < C; c++) {
      const int expert = lane + 32 * c;
      if (expert < p.n_experts) sums[warp * n_ids + group * p.n_experts + expert] = of_column[c];
    }
  }
  __syncthreads();
  for (int id = threadIdx.x; id < n_ids; id += blockDim.x) {
    const uint4 mask = *reinterpret_cast<const uint4*>(masks + id * MASK_WORDS);
    const i64 at = i64(blockIdx.x) * n_ids + id;
    p.masks[at] = mask;
    p.counts[i64(id) * n_chunks + blockIdx.x] = __popc(mask.x) + __popc(mask.y) + __popc(mask.z) + __popc(mask.w);
    if (p.parts != nullptr) {
      float sum = 0.f;
      for (int w = 0; w < SELECT_WARPS; w++) sum += sums[w * n_ids + id];
      p.parts[at] = sum;
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) select_32(const __grid_constant__ Selection p) {
  select_experts<1>(p);
}
extern "C" __global__ void __launch_bounds__(256) select_256(const __grid_constant__ Selection p) {
  select_experts<8>(p);
}
extern "C" __global__ void __launch_bounds__(256, 4) select_512(const __grid_constant__ Selection p) {
  select_experts<16>(p);
}
extern "C" __global__ void __launch_bounds__(256) select_1024(const __grid_constant__ Selection p) {
  select_experts<32>(p);
}

// Sums before each thread of a block of 256, and the sum of all.
__device__ __forceinline__ int block_scan(int value, int& total) {
  __shared__ int warp_sums[8];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int before = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, distance);
    if (lane >= distance) before += other;
  }
  if (lane == 31) warp_sums[warp] = before;
  __syncthreads();
  total = 0;
  for (int w = 0; w < 8; w++) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  __syncthreads();
  return before - value;
}

// One block for each expert: its selections in earlier chunks, and all.
extern "C" __global__ void __launch_bounds__(256) scan_chunks(const __grid_constant__ Selection p) {
  const int n_chunks = int(p.n_tokens / p.seq_len) * p.chunks_per_sequence;
  int* counts = p.counts + i64(blockIdx.x) * n_chunks;
  int before = 0;
  for (int chunk0 = 0; chunk0 < n_chunks; chunk0 += blockDim.x) {
    const int chunk = chunk0 + threadIdx.x;
    int total;
    const int in_block = block_scan(chunk < n_chunks ? counts[chunk] : 0, total);
    if (chunk < n_chunks) counts[chunk] = before + in_block;
    before += total;
  }
  if (threadIdx.x == 0) p.totals[blockIdx.x] = before;
}

// One block for each chunk: where its selections stand in the sorted order.
extern "C" __global__ void __launch_bounds__(256) place_selections(const __grid_constant__ Selection p) {
  const int n_ids = p.n_groups * p.n_experts, n_chunks = gridDim.x;
  int* starts = reinterpret_cast<int*>(shared_memory);
  int before = 0;
  for (int id0 = 0; id0 < n_ids; id0 += blockDim.x) {
    const int id = id0 + threadIdx.x;
    const int own = id < n_ids ? p.totals[id] : 0;
    int total;
    const int start = before + block_scan(own, total);
    before += total;
    if (id >= n_ids) continue;
    starts[id] = start + p.counts[i64(id) * n_chunks + blockIdx.x];
    if (blockIdx.x == 0) p.ends[id] = start + own;
  }
  __syncthreads();
  const int sequence = blockIdx.x / p.chunks_per_sequence;
  const int token0 = blockIdx.x % p.chunks_per_sequence * CHUNK;
  const int per_token = p.n_groups * p.top_k, n_tokens = min(CHUNK, p.seq_len - token0);
  const i64 first = (i64(sequence) * p.seq_len + token0) * per_token;
  for (int at = threadIdx.x; at < n_tokens * per_token; at += blockDim.x) {
    const int local = at / per_token, id = p.ids[first + at];
    const uint4 mask = p.masks[i64(blockIdx.x) * n_ids + id];
    const u32 words[MASK_WORDS] = {mask.x, mask.y, mask.z, mask.w};
    int place = starts[id];
#pragma unroll
    for (int word = 0; word < MASK_WORDS; word++) {
      const u32 earlier = word < local / 32 ? 0xffffffffu : word > local / 32 ? 0u : (1u << (local & 31)) - 1;
      place += __popc(words[word] & earlier);
    }
    p.order[place] = first + at;
    p.inverse[first + at] = place;
  }
}

// logit_grads = p · (P - Σ p · P) + gate_grads · gate · (1 - gate) at what was selected, with p = softmax(logits) and P
// the gradients of the probabilities; one warp for each token and group
extern "C" __global__ void __launch_bounds__(256) select_backward(const __grid_constant__ Selection p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 row = i64(blockIdx.x) * SELECT_WARPS + warp;
  const i64 token = row / p.n_groups;
  if (token >= p.n_tokens) return;
  const int group = int(row % p.n_groups), n_ids = p.n_groups * p.n_experts;
  float* grads = reinterpret_cast<float*>(shared_memory) + warp * p.n_experts;
  const i64 first = token * p.pitch + group * p.n_experts;
  if (p.probability_grads != nullptr) {
    const float* of_expert = p.probability_grads + token / p.seq_len * n_ids + group * p.n_experts;
    const float log_sum = p.log_sums[row];
    float product = 0.f;
    for (int expert = lane; expert < p.n_experts; expert += 32) {
      const float probability = __expf(p.logits[first + expert] - log_sum);
      product += probability * of_expert[expert];
      grads[expert] = probability;
    }
    product = warp_sum(product);
    for (int expert = lane; expert < p.n_experts; expert += 32) grads[expert] *= of_expert[expert] - product;
  } else {
    for (int expert = lane; expert < p.n_experts; expert += 32) grads[expert] = 0.f;
  }
  __syncwarp();
  if (p.gate_grads != nullptr && lane < p.top_k) {
    const i64 selection = row * p.top_k + lane;
    const float gate = p.gates[selection];
    grads[p.ids[selection] - group * p.n_experts] += p.gate_grads[selection] * gate * (1.f - gate);
  }
  __syncwarp();
  // The last group also clears what pads the row.
  const int n_columns = group + 1 < p.n_groups ? p.n_experts : p.pitch - group * p.n_experts;
  for (int column = lane; column < n_columns; column += 32) {
    const float grad = column < p.n_experts ? grads[column] : 0.f;
    if (p.is_wide) {
      static_cast<float*>(p.logit_grads)[first + column] = grad;
    } else {
      static_cast<u16*>(p.logit_grads)[first + column] = u16(pack(grad, 0.f));
    }
  }
}
