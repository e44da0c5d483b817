// What only GPUs of compute capability 9.0 have. Products by warpgroups: tensor cores read both operands from shared
// memory, and a block computes 256 × 128 results, so that operands pass through the L2 cache less often. And products
// whose rows the L2 cache adds, eight 16-bit numbers at a time. Compiled as an empty file for other GPUs.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int GROUP_THREADS = 256;
constexpr int GROUP_STAGES = 4;
// A step of an operand of 64 free elements; a stage has four and two of them.
constexpr int BLOCK_BYTES = 64 * STEP * 2;
constexpr int GROUP_STAGE_BYTES = 6 * BLOCK_BYTES;

// How tensor cores find an operand: blocks of 64 free elements by 64 contracted ones in rows of 128 bytes whose
// 16-byte pieces are permuted by the number of the row. Rows run along the contracted axis, *inner*, or across it,
// *outer*. Shared memory starts at a multiple of 1024 bytes.
template <bool IS_OUTER>
__device__ __forceinline__ unsigned long long descriptor(u32 address) {
  constexpr unsigned long long PERMUTED = 1ull << 62;
  constexpr unsigned long long EIGHT_ROWS = (1024ull >> 4) << 32;
  constexpr unsigned long long NEXT_BLOCK = IS_OUTER ? (unsigned long long)(BLOCK_BYTES >> 4) << 16 : 1ull << 16;
  return PERMUTED | EIGHT_ROWS | NEXT_BLOCK | ((address & 0x3ffff) >> 4);
}

// From the start of an operand to its 16 contracted elements number k.
template <bool IS_OUTER>
__device__ __forceinline__ u32 contracted_offset(int k) {
  return IS_OUTER ? k * 2048 : k * 32;
}

#ifdef IS_F16
#define WGMMA_TYPES "f32.f16.f16"
#else
#define WGMMA_TYPES "f32.bf16.bf16"
#endif
#define D2(i) "+f"(d[i]), "+f"(d[i + 1])
#define D8(i) D2(i), D2(i + 2), D2(i + 4), D2(i + 6)

// d += a · b with a 64 × 16, b 16 × 128, spread over a warpgroup.
template <bool IS_LEFT_OUTER, bool IS_RIGHT_OUTER>
__device__ __forceinline__ void wgmma(float (&d)[64], unsigned long long a, unsigned long long b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
      "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"
      "%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, 1, %66, %67;"
      : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
      : "l"(a), "l"(b), "n"(IS_LEFT_OUTER ? 1 : 0), "n"(IS_RIGHT_OUTER ? 1 : 0));
}

// Sums of a thread: two tiles of 64 × 128 of its warpgroup.
typedef float GroupSums[2][64];

// The whole contraction. Of the 256 × 128 tile, or 128 × 256 if not IS_TALL, warpgroup w has rows 128·w, or columns.
// `load(step, stage)` starts the copies of one step: the left operand, then the right one.
template <bool IS_TALL, bool IS_LEFT_OUTER, bool IS_RIGHT_OUTER, typename Load>
__device__ __forceinline__ void contract_in_groups(GroupSums& sums, u32 shared, int n_steps, const Load& load) {
  const int group = threadIdx.x >> 7;
  const u32 left_of_group = IS_TALL ? group * 2 * BLOCK_BYTES : 0;
  const u32 right_of_group = (IS_TALL ? 4 : 2 + 2 * group) * BLOCK_BYTES;
  for (int s = 0; s < GROUP_STAGES - 1; s++) {
    if (s < n_steps) load(s, shared + s * GROUP_STAGE_BYTES);
    commit_copies();
  }
  for (int s = 0; s < n_steps; s++) {
    wait_for_copies<GROUP_STAGES - 2>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const u32 stage = shared + s % GROUP_STAGES * GROUP_STAGE_BYTES;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < STEP / 16; k++) {
      const u32 left = stage + left_of_group + contracted_offset<IS_LEFT_OUTER>(k);
      const auto right = descriptor<IS_RIGHT_OUTER>(stage + right_of_group + contracted_offset<IS_RIGHT_OUTER>(k));
#pragma unroll
      for (int half = 0; half < 2; half++)
        wgmma<IS_LEFT_OUTER, IS_RIGHT_OUTER>(sums[half], descriptor<IS_LEFT_OUTER>(left + half * BLOCK_BYTES), right);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    // The products of the step before are done, so its stage may be filled.
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    __syncthreads();
    const int next = s + GROUP_STAGES - 1;
    if (next < n_steps) load(next, shared + next % GROUP_STAGES * GROUP_STAGE_BYTES);
    commit_copies();
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  wait_for_copies<0>();
  __syncthreads();
}

// Where a thread copies an operand of WIDTH free elements to, by outer rows.
template <int WIDTH>
struct GroupPlace {
  static constexpr int N_ROWS = GROUP_THREADS * 8 / WIDTH;
  static constexpr int N_PASSES = STEP / N_ROWS;
  int row, piece;
  u32 address;
  __device__ __forceinline__ GroupPlace(int thread)
      : row(thread / (WIDTH / 8)),
        piece(thread % (WIDTH / 8)),
        address(piece / 8 * BLOCK_BYTES + row * 128 + ((piece % 8 ^ (row & 7)) << 4)) {}
  __device__ __forceinline__ u32 at(u32 operand, int pass) const { return operand + address + pass * N_ROWS * 128; }
};

// Calls `visit(row, column, first, second)` for each pair of neighboring sums of this thread.
template <bool IS_TALL, typename Visit>
__device__ __forceinline__ void each_group_pair(GroupSums& sums, const Visit& visit) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, group = threadIdx.x >> 7;
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int eighth = 0; eighth < 2; eighth++) {
      const int row = (IS_TALL ? group * 128 : 0) + half * 64 + warp * 16 + eighth * 8 + (lane >> 2);
#pragma unroll
      for (int j = 0; j < 16; j++) {
        const int column = (IS_TALL ? 0 : group * 128) + j * 8 + (lane & 3) * 2;
        visit(row, column, sums[half][j * 4 + eighth * 2], sums[half][j * 4 + eighth * 2 + 1]);
      }
    }
  }
}

// As `outer_product`.
template <bool IS_TALL>
__device__ __forceinline__ void outer_product_in_groups(const OuterProduct& p) {
  constexpr int DOWN = IS_TALL ? 256 : 128, ACROSS = IS_TALL ? 128 : 256;
  const int n_down = (p.d_left + DOWN - 1) / DOWN, n_across = (p.d_right + ACROSS - 1) / ACROSS;
  const int split = blockIdx.x % p.n_splits, tile_of_all = blockIdx.x / p.n_splits;
  const int expert = p.ranked[tile_of_all / (n_down * n_across)], tile = tile_of_all % (n_down * n_across);
  const int first = expert == 0 ? 0 : p.ends[expert - 1], last = p.ends[expert];
  const int steps_of_split = ((last - first + STEP - 1) / STEP + p.n_splits - 1) / p.n_splits;
  const int row0 = min(first + split * steps_of_split * STEP, last), end = min(row0 + steps_of_split * STEP, last);
  const int down0 = tile / n_across * DOWN, across0 = tile % n_across * ACROSS;
  const GroupPlace<DOWN> left_place(threadIdx.x);
  const GroupPlace<ACROSS> right_place(threadIdx.x);
  const u32 left_piece = down0 / 8 + left_place.piece, right_piece = across0 / 8 + right_place.piece;
  const bool has_left = left_piece < p.d_left / 8, has_right = right_piece < p.d_right / 8;

  // Places of the rows of the step that is loaded next, read one step early.
  u32 left_next[left_place.N_PASSES], right_next[right_place.N_PASSES];
  const auto find_sources = [&](int step) {
#pragma unroll
    for (int i = 0; i < left_place.N_PASSES; i++) {
      const int row = row0 + step * STEP + left_place.row + left_place.N_ROWS * i;
      left_next[i] = row >= end ? NO_SOURCE : p.left_sources == nullptr ? row : p.left_sources[row];
    }
#pragma unroll
    for (int i = 0; i < right_place.N_PASSES; i++) {
      const int row = row0 + step * STEP + right_place.row + right_place.N_ROWS * i;
      right_next[i] = row >= end ? NO_SOURCE : p.right_sources == nullptr ? row : p.right_sources[row];
    }
  };
  find_sources(0);
  const auto load = [&](int step, u32 stage) {
#pragma unroll
    for (int i = 0; i < left_place.N_PASSES; i++) {
      const bool is_valid = has_left && left_next[i] != NO_SOURCE;
      copy_async(left_place.at(stage, i), p.left + (is_valid ? i64(left_next[i]) * p.d_left + left_piece * 8 : 0),
                 is_valid);
    }
#pragma unroll
    for (int i = 0; i < right_place.N_PASSES; i++) {
      const bool is_valid = has_right && right_next[i] != NO_SOURCE;
      copy_async(right_place.at(stage + DOWN / 64 * BLOCK_BYTES, i),
                 p.right + (is_valid ? i64(right_next[i]) * p.d_right + right_piece * 8 : 0), is_valid);
    }
    find_sources(step + 1);
  };
  GroupSums sums = {};
  contract_in_groups<IS_TALL, true, true>(sums, shared_address(shared_memory), (end - row0 + STEP - 1) / STEP, load);

  const int n_rows = p.d_left - down0, n_columns = p.d_right - across0;
  const i64 at = ((i64(split) * p.n_experts + expert) * p.d_left + down0) * p.d_right + across0;
  each_group_pair<IS_TALL>(sums, [&](int row, int column, float one, float other) {
    if (row >= n_rows || column >= n_columns) return;
    const i64 to = at + i64(row) * p.d_right + column;
    if (p.is_wide) {
      *reinterpret_cast<float2*>(static_cast<float*>(p.y) + to) = make_float2(one, other);
    } else {
      *reinterpret_cast<u32*>(static_cast<u16*>(p.y) + to) = pack(one, other);
    }
  });
}

extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    outer_product_tall(const __grid_constant__ OuterProduct p) {
  outer_product_in_groups<true>(p);
}
extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    outer_product_broad(const __grid_constant__ OuterProduct p) {
  outer_product_in_groups<false>(p);
}

// Where a thread copies an operand to, by inner rows: of the row 32·pass further down.
struct GroupInnerPlace {
  static constexpr int N_ROWS = GROUP_THREADS / 8;
  int row, piece;
  u32 address;
  __device__ __forceinline__ GroupInnerPlace(int thread)
      : row(thread >> 3), piece(thread & 7), address(row * 128 + ((piece ^ (row & 7)) << 4)) {}
  __device__ __forceinline__ u32 at(u32 operand, int pass) const { return operand + address + pass * N_ROWS * 128; }
};

constexpr int GROUP_ROWS = 256;

// As `rows_product`, for tiles of 256 rows.
template <bool IS_TRANSPOSED>
__device__ __forceinline__ void rows_product_in_groups(const RowsProduct& p, const RowsTile& tile, GroupSums& sums) {
  const GroupInnerPlace inner(threadIdx.x);
  const GroupPlace<TILE> outer(threadIdx.x);
  const u32 pieces_in = p.d_in / 8, pieces_out = p.d_out / 8;
  constexpr int N_PASSES = GROUP_ROWS / inner.N_ROWS;
  u32 x_pieces[N_PASSES];
#pragma unroll
  for (int i = 0; i < N_PASSES; i++) {
    const int row = inner.row + inner.N_ROWS * i;
    x_pieces[i] = NO_SOURCE;
    if (row < tile.n_rows) {
      const u32 source = p.sources == nullptr ? u32(tile.row0 + row) : u32(p.sources[tile.row0 + row]);
      x_pieces[i] = source * pieces_in + inner.piece;
    }
  }
  const u16* weight = p.weight + i64(tile.expert) * p.d_in * p.d_out;
  const auto load = [&](int step, u32 stage) {
    const u32 piece0 = step * (STEP / 8), right = stage + GROUP_ROWS / 64 * BLOCK_BYTES;
    const bool is_inside = piece0 + inner.piece < pieces_in;
#pragma unroll
    for (int i = 0; i < N_PASSES; i++) {
      const bool is_valid = is_inside && x_pieces[i] != NO_SOURCE;
      copy_async(inner.at(stage, i), p.x + (is_valid ? i64(x_pieces[i] + piece0) * 8 : 0), is_valid);
    }
    if constexpr (IS_TRANSPOSED) {
#pragma unroll
      for (int i = 0; i < TILE / inner.N_ROWS; i++) {
        const u32 column = tile.column0 + inner.row + inner.N_ROWS * i;
        const bool is_valid = is_inside && column < p.d_out;
        const u32 piece = column * pieces_in + piece0 + inner.piece;
        copy_async(inner.at(right, i), weight + (is_valid ? i64(piece) * 8 : 0), is_valid);
      }
    } else {
#pragma unroll
      for (int i = 0; i < outer.N_PASSES; i++) {
        const u32 row = step * STEP + outer.row + outer.N_ROWS * i, column_piece = tile.column0 / 8 + outer.piece;
        const bool is_valid = row < p.d_in && column_piece < pieces_out;
        copy_async(outer.at(right, i), weight + (is_valid ? i64(row * pieces_out + column_piece) * 8 : 0), is_valid);
      }
    }
  };
  const int n_steps = (p.d_in + STEP - 1) / STEP;
  contract_in_groups<true, false, !IS_TRANSPOSED>(sums, shared_address(shared_memory), n_steps, load);
}

// As `store_tile`, for 256 rows.
__device__ __forceinline__ void store_group_tile(const u16* staged, u16* to, i64 width, int n_rows, int n_columns) {
  const int row0 = threadIdx.x >> 4, piece = threadIdx.x & 15;
  if (piece * 8 >= n_columns) return;
#pragma unroll 4
  for (int row = row0; row < n_rows; row += GROUP_THREADS / 16) {
    const uint4 values = *reinterpret_cast<const uint4*>(staged + row * STAGED_PITCH + piece * 8);
    *reinterpret_cast<uint4*>(to + row * width + piece * 8) = values;
  }
}

template <bool IS_TRANSPOSED>
__device__ __forceinline__ void plain_product_in_groups(const RowsProduct& p) {
  RowsTile tile;
  if (!find_tile(p, tile)) return;
  GroupSums sums = {};
  rows_product_in_groups<IS_TRANSPOSED>(p, tile, sums);
  each_group_pair<true>(sums, [&](int row, int column, float first, float second) {
    staged_pair(shared_memory, row, column) = pack(first, second);
  });
  __syncthreads();
  store_group_tile(shared_memory, p.y + i64(tile.row0) * p.d_out + tile.column0, p.d_out, tile.n_rows,
                   tile.n_columns);
}

// As `product`, and the others as their namesakes, with tiles of 256 rows.
extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    product_in_groups(const __grid_constant__ RowsProduct p) {
  plain_product_in_groups<false>(p);
}

extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    product_transposed_in_groups(const __grid_constant__ RowsProduct p) {
  plain_product_in_groups<true>(p);
}

extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    up_in_groups(const __grid_constant__ RowsProduct p) {
  RowsTile tile;
  if (!find_tile(p, tile)) return;
  GroupSums sums = {};
  rows_product_in_groups<false>(p, tile, sums);

  u16* staged_y = shared_memory;
  u16* staged_hidden = shared_memory + GROUP_ROWS * STAGED_PITCH;
  const u16* bias = p.bias == nullptr ? nullptr : p.bias + i64(tile.expert) * p.d_out + tile.column0;
  with_activation(p, [&](auto is_relu) {
    constexpr bool IS_RELU = decltype(is_relu)::value;
    each_group_pair<true>(sums, [&](int row, int column, float first, float second) {
      activate_pair<IS_RELU>(p, tile, bias, staged_y, staged_hidden, row, column, first, second);
    });
  });
  __syncthreads();
  const i64 at = i64(tile.row0) * p.d_out + tile.column0;
  store_group_tile(staged_y, p.y + at, p.d_out, tile.n_rows, tile.n_columns);
  if (p.hidden != nullptr) store_group_tile(staged_hidden, p.hidden + at, p.d_out, tile.n_rows, tile.n_columns);
}

extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    down_backward_in_groups(const __grid_constant__ RowsProduct p) {
  RowsTile tile;
  if (!find_tile(p, tile)) return;
  GroupSums sums = {};
  rows_product_in_groups<true>(p, tile, sums);

  u16* staged_y = shared_memory;
  u16* staged_weighted = shared_memory + GROUP_ROWS * STAGED_PITCH;
  float* dots = reinterpret_cast<float*>(staged_weighted + GROUP_ROWS * STAGED_PITCH);
  float* gates = dots + GROUP_ROWS;
  const i64 at = i64(tile.row0) * p.d_out + tile.column0;
  const int piece = threadIdx.x & 15;
  for (int row = threadIdx.x >> 4; row < GROUP_ROWS; row += GROUP_THREADS / 16) {
    const bool is_valid = row < tile.n_rows && piece * 8 < tile.n_columns;
    const u16* from = p.hidden + (is_valid ? at + i64(row) * p.d_out + piece * 8 : 0);
    copy_async(shared_address(staged_y + row * STAGED_PITCH + piece * 8), from, is_valid);
  }
  commit_copies();
  const i64 selection = threadIdx.x < tile.n_rows ? p.order[tile.row0 + threadIdx.x] : -1;
  gates[threadIdx.x] = selection < 0 ? 0.f : p.gates[selection];
  wait_for_copies<0>();
  __syncthreads();

  with_activation(p, [&](auto is_relu) {
    constexpr bool IS_RELU = decltype(is_relu)::value;
    float dot = 0.f;
    each_group_pair<true>(sums, [&](int row, int column, float first, float second) {
      dot += differentiate_pair<IS_RELU>(p, gates[row], staged_y, staged_weighted, row, column, first, second);
      // The last pair of a row: `each_group_pair` goes through a row's columns before the next row.
      if (column >= TILE - 8) {
        dot += __shfl_xor_sync(0xffffffffu, dot, 1);
        dot += __shfl_xor_sync(0xffffffffu, dot, 2);
        if ((threadIdx.x & 3) == 0) dots[row] = dot;
        dot = 0.f;
      }
    });
  });
  __syncthreads();
  store_group_tile(staged_y, p.y + at, p.d_out, tile.n_rows, tile.n_columns);
  store_group_tile(staged_weighted, p.weighted + at, p.d_out, tile.n_rows, tile.n_columns);
  if (selection >= 0) p.gate_grads[tile.column0 / TILE * p.n_rows + selection] = dots[threadIdx.x];
}

// y[target of r] += gate of r · (x[source of r] · weight[expert]), rounded to the element type at each addition, in
// whatever order blocks come to it. Rows of a result are close in time where tiles are listed by windows, so that it
// stays in the L2 cache, which adds. Nothing that is staged passes through memory.
struct Added {
  u16* y;
  const int* targets;
  const float* factors;
  int n_rows, d_out;
  __device__ __forceinline__ void operator()(const Sums& sums, int column0) {
    each_piece(
        sums, [&](int row) { return factors[row]; },
        [&](int row, int column, uint4 piece) {
          if (row >= n_rows || column0 + column >= d_out) return;
          u16* to = y + i64(targets[row]) * d_out + column0 + column;
#ifdef IS_F16
          asm volatile("red.global.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};"
#else
          asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};"
#endif
                       ::"l"(to), "r"(piece.x), "r"(piece.y), "r"(piece.z), "r"(piece.w)
                       : "memory");
        });
  }
};

template <bool IS_TRANSPOSED>
__device__ __forceinline__ void added_wide_product(const RowsProduct& p) {
  __shared__ int targets[TILE];
  __shared__ float factors[TILE];
  if (blockIdx.x >= *p.n_tiles) return;
  const int4 of_rows = p.tiles[blockIdx.x];
  const int row = of_rows.y + threadIdx.x;
  if (row < of_rows.z) {
    targets[threadIdx.x] = p.targets[row];
    factors[threadIdx.x] = p.gates == nullptr ? 1.f : p.gates[p.order[row]];
  }
  Added added{p.y, targets, factors, of_rows.z - of_rows.y, p.d_out};
  wide_product<IS_TRANSPOSED>(p, of_rows, added);
}

extern "C" __global__ void __launch_bounds__(N_THREADS, 2) added_product(const __grid_constant__ RowsProduct p) {
  added_wide_product<false>(p);
}
extern "C" __global__ void __launch_bounds__(N_THREADS, 2)
    added_product_transposed(const __grid_constant__ RowsProduct p) {
  added_wide_product<true>(p);
}

#endif
