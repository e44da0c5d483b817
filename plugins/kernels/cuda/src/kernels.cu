// The kernels of the σ-MoE layer and of the grouped matrix product, for NVIDIA GPUs of compute capability 8.0 and
// later.
//
// One module has one element type: bfloat16, or float16 if IS_F16 is defined. Products are summed in fp32. The file
// includes nothing, because the run-time compiler comes without CUDA's headers.
//
// Words used throughout: a *row* is one selection in the order of the experts, so each expert owns a run of rows; a
// *source* is the place of a row in a tensor that is not in that order, such as the token of a selection. Rows are read
// by their sources straight into shared memory, so no gathered copy of a tensor exists. Widths are multiples of 8
// elements, 16 bytes, which the caller pads; all other sizes are free.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

// ---------------------------------------------------------------------------------------------------------------------
// Elements
// ---------------------------------------------------------------------------------------------------------------------

// Two fp32 numbers as two elements, the first in the low half.
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
#ifdef IS_F16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}

__device__ __forceinline__ float2 unpack(u32 both) {
#ifdef IS_F16
  float2 values;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(values.x), "=f"(values.y)
      : "r"(both));
  return values;
#else
  return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
#endif
}

// d += a · b with a 16 × 16, b 16 × 8.
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#ifdef IS_F16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, asynchronously; zeros if `is_valid` is false, and then nothing is read.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool is_valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N_PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N_PENDING) : "memory");
}

template <bool IS_TRANSPOSED>
__device__ __forceinline__ void load_matrices(u32 (&m)[4], u32 address) {
  if constexpr (IS_TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles: 128 × 128 results, the contracted axis in steps of 64, four warps of 64 × 64 each
// ---------------------------------------------------------------------------------------------------------------------

extern __shared__ __align__(1024) u16 shared_memory[];

constexpr int TILE = 128;
constexpr int STEP = 64;
constexpr int N_STAGES = 3;
constexpr int N_THREADS = 128;
constexpr int OPERAND_BYTES = TILE * STEP * 2;
constexpr int STAGE_BYTES = 2 * OPERAND_BYTES;
// 16-byte pieces of an operand that a thread copies.
constexpr int N_PIECES = OPERAND_BYTES / 16 / N_THREADS;
constexpr u32 NO_SOURCE = 0xffffffffu;
// Elements from one row of a finished tile to the next in shared memory: 8 more than a row, so that the eight rows that
// a warp writes at once lie in different banks.
constexpr int STAGED_PITCH = TILE + 8;

typedef float Sums[4][8][4];

// Two layouts of an operand in shared memory. *Inner*: 128 rows of 64 contracted elements. *Outer*: 64 rows, one for
// each contracted element, of 128. In both, the 16-byte pieces of a row are permuted by the low bits of its number, so
// that the eight rows that `ldmatrix` reads at once lie in different banks.

struct InnerPlace {
  int row, piece;
  u32 address;
  __device__ __forceinline__ InnerPlace(int thread)
      : row(thread >> 3), piece(thread & 7), address(row * 128 + ((piece ^ (row & 7)) << 4)) {}
  // Of the row 16·i further down.
  __device__ __forceinline__ u32 at(u32 operand, int i) const { return operand + address + i * 2048; }
};

struct OuterPlace {
  int row, piece;
  u32 address;
  __device__ __forceinline__ OuterPlace(int thread)
      : row(thread >> 4), piece(thread & 15), address(row * 256 + ((piece ^ (row & 7)) << 4)) {}
  // Of the row 8·i further down.
  __device__ __forceinline__ u32 at(u32 operand, int i) const { return operand + address + i * 2048; }
};

// Where this lane's part of the 16 × 16 block `block` along the operand's free axis starts, at contracted element
// 16·k. `HALF` is the lane bit that selects the upper half of the free axis: 3 for the left operand, 4 for the right.
template <bool IS_OUTER, int HALF>
__device__ __forceinline__ u32 block_address(u32 operand, int block, int k, int lane) {
  constexpr int OTHER = 7 - HALF;
  const int free_half = (lane >> HALF) & 1, contracted_half = (lane >> OTHER) & 1;
  if constexpr (IS_OUTER) {
    const int row = k * 16 + (lane & 7) + contracted_half * 8;
    return operand + row * 256 + (((block * 2 + free_half) ^ (row & 7)) << 4);
  } else {
    const int row = block * 16 + (lane & 7) + free_half * 8;
    return operand + row * 128 + (((k * 2 + contracted_half) ^ (row & 7)) << 4);
  }
}

// Adds the product of two operands, one step of the contraction, to `sums`.
template <bool IS_LEFT_OUTER, bool IS_RIGHT_OUTER>
__device__ __forceinline__ void multiply(Sums& sums, u32 left, u32 right) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int k = 0; k < STEP / 16; k++) {
    u32 a[4][4], b[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      load_matrices<IS_LEFT_OUTER>(a[i], block_address<IS_LEFT_OUTER, 3>(left, (warp & 1) * 4 + i, k, lane));
      load_matrices<IS_RIGHT_OUTER>(b[i], block_address<IS_RIGHT_OUTER, 4>(right, (warp >> 1) * 4 + i, k, lane));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < 8; j++) mma(sums[i][j], a[i], b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]);
    }
  }
}

// The whole contraction: `load(step, stage)` starts the copies of one step.
template <bool IS_LEFT_OUTER, bool IS_RIGHT_OUTER, typename Load>
__device__ __forceinline__ void contract(Sums& sums, u32 shared, int n_steps, const Load& load) {
  for (int s = 0; s < N_STAGES - 1; s++) {
    if (s < n_steps) load(s, shared + s * STAGE_BYTES);
    commit_copies();
  }
  u32 reading = shared, writing = shared + (N_STAGES - 1) * STAGE_BYTES;
  const u32 end = shared + N_STAGES * STAGE_BYTES;
  for (int s = 0; s < n_steps; s++) {
    wait_for_copies<N_STAGES - 2>();
    __syncthreads();
    if (s + N_STAGES - 1 < n_steps) load(s + N_STAGES - 1, writing);
    commit_copies();
    multiply<IS_LEFT_OUTER, IS_RIGHT_OUTER>(sums, reading, reading + OPERAND_BYTES);
    reading = reading + STAGE_BYTES == end ? shared : reading + STAGE_BYTES;
    writing = writing + STAGE_BYTES == end ? shared : writing + STAGE_BYTES;
  }
  wait_for_copies<0>();
  __syncthreads();
}

// Calls `visit(row, column, first, second)` for each pair of neighboring sums of this thread.
template <typename Visit>
__device__ __forceinline__ void each_pair(Sums& sums, const Visit& visit) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = (warp & 1) * 64 + i * 16 + half * 8 + (lane >> 2);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int column = (warp >> 1) * 64 + j * 8 + (lane & 3) * 2;
        visit(row, column, sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
      }
    }
  }
}

__device__ __forceinline__ u32& staged_pair(u16* staged, int row, int column) {
  return *reinterpret_cast<u32*>(staged + row * STAGED_PITCH + column);
}

// Copies a staged tile to `to`, the tile's first element in a matrix `width` wide.
__device__ __forceinline__ void store_tile(const u16* staged, u16* to, i64 width, int n_rows, int n_columns) {
  const OuterPlace place(threadIdx.x);
  if (place.piece * 8 >= n_columns) return;
#pragma unroll 4
  for (int row = place.row; row < n_rows; row += 8) {
    const uint4 piece = *reinterpret_cast<const uint4*>(staged + row * STAGED_PITCH + place.piece * 8);
    *reinterpret_cast<uint4*>(to + row * width + place.piece * 8) = piece;
  }
}

// The four lanes of a row exchange pairs: lane l gives its j-th to lane j, and gets that one's l-th. What were pairs of
// four neighboring times eight columns become eight neighboring columns in each lane, and the other way round.
__device__ __forceinline__ void exchange(u32 (&pairs)[4]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool is_upper = lane & distance;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j & distance) continue;
      const u32 other = __shfl_xor_sync(0xffffffffu, is_upper ? pairs[j] : pairs[j + distance], distance);
      if (is_upper) {
        pairs[j] = other;
      } else {
        pairs[j + distance] = other;
      }
    }
  }
}

// Calls `visit(row, column, piece)` for each eight neighboring sums of a row, times `factor_of(row)`. The four lanes
// of a row exchange pairs until each has eight neighboring columns: four pieces of a row lie side by side.
template <typename Factor, typename Visit>
__device__ __forceinline__ void each_piece(const Sums& sums, const Factor& factor_of, const Visit& visit) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = (warp & 1) * 64 + i * 16 + half * 8 + (lane >> 2);
      const float factor = factor_of(row);
#pragma unroll
      for (int j0 = 0; j0 < 8; j0 += 4) {
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
          pairs[j] = pack(factor * sums[i][j0 + j][half * 2], factor * sums[i][j0 + j][half * 2 + 1]);
        exchange(pairs);
        visit(row, (warp >> 1) * 64 + (j0 + (lane & 3)) * 8, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Which tiles there are
// ---------------------------------------------------------------------------------------------------------------------

struct TileList {
  const int* ends;
  // Of the rows, ascending within an expert; or null.
  const int* sources;
  int4* tiles;
  // Two zeros: the number of tiles is added to the first, the second is left to blocks that take tiles one by one.
  int* n_tiles;
  // Sources of a window.
  int n_experts, window;
  // Rows of a tile.
  int n_rows;
  // Whether tiles end with their window, too.
  int is_cut;
};

// Lists the row tiles of all experts as (expert, first row, end of rows): those that begin in one window of sources,
// expert by expert, then those of another, in whatever order windows come. Tiles that run at the same time so read or
// add to one window, which then stays in the L2 cache, however uneven experts are. Without sources there is one window.
// Block g makes window g.
extern "C" __global__ void __launch_bounds__(1024) list_tiles(const __grid_constant__ TileList p) {
  __shared__ int warp_sums[32], first_of_block;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
  const bool is_last = blockIdx.x + 1 == gridDim.x;
  // Rows of an expert's tiles in this window. Both ends are searched for at once, since a search is a chain of loads.
  const auto find = [&](int start, int end) {
    int low[2] = {start, start}, high[2] = {blockIdx.x == 0 ? start : end, end};
    const i64 limits[2] = {i64(blockIdx.x) * p.window, (i64(blockIdx.x) + 1) * p.window};
    if (is_last) low[1] = end;
    while (low[0] < high[0] || low[1] < high[1]) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (low[i] >= high[i]) continue;
        const int middle = (low[i] + high[i]) / 2;
        if (p.sources[middle] < limits[i]) {
          low[i] = middle + 1;
        } else {
          high[i] = middle;
        }
      }
    }
    const auto whole_tiles = [&](int row) {
      return p.is_cut ? row : min(start + (row - start + p.n_rows - 1) / p.n_rows * p.n_rows, end);
    };
    return make_int2(whole_tiles(low[0]), whole_tiles(low[1]));
  };

  for (int expert0 = 0; expert0 < p.n_experts; expert0 += blockDim.x) {
    const int expert = expert0 + threadIdx.x;
    int2 rows = make_int2(0, 0);
    if (expert < p.n_experts) rows = find(expert == 0 ? 0 : p.ends[expert - 1], p.ends[expert]);
    const int n_own = (rows.y - rows.x + p.n_rows - 1) / p.n_rows;
    int at = n_own;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, at, distance);
      if (lane >= distance) at += other;
    }
    if (lane == 31) warp_sums[warp] = at;
    __syncthreads();
    if (threadIdx.x == 0) {
      int sum = 0;
      for (int w = 0; w < n_warps; w++) sum += warp_sums[w];
      first_of_block = atomicAdd(p.n_tiles, sum);
    }
    __syncthreads();
    at += first_of_block - n_own;
    for (int w = 0; w < warp; w++) at += warp_sums[w];
    for (int i = 0; i < n_own; i++) {
      const int row = rows.x + i * p.n_rows;
      p.tiles[at + i] = make_int4(expert, row, min(row + p.n_rows, rows.y), 0);
    }
    __syncthreads();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows times the matrices of their experts
// ---------------------------------------------------------------------------------------------------------------------

struct RowsProduct {
  // Left operand [.., d_in] and the places of the rows in it, or null if it is in the order of the rows.
  const u16* x;
  const int* sources;
  // [n_experts, d_in, d_out], or [n_experts, d_out, d_in] for the kernels that end in `_transposed`.
  const u16* weight;
  // [n_rows, d_out].
  u16* y;
  const int4* tiles;
  int* n_tiles;
  int d_in, d_out;
  // 1 for ReLU, 2 for GELU, where the kernel has an activation.
  int activation;
  // Bias [n_experts, d_out] of `up`, or null.
  const u16* bias;
  // `up`: the argument of the activation is left here, unless null. `down_backward`: what `up` left, its result for
  // ReLU and the argument for GELU.
  u16* hidden;
  // `down_backward` and `added_product`: gates by selection, selections by row; null means 1.
  const float* gates;
  const i64* order;
  // `down_backward`: the two further results.
  float* gate_grads;
  u16* weighted;
  // `added_product`: the row of the result to which each row is added.
  const int* targets;
  i64 n_rows;
};

constexpr int RELU = 1;

__device__ __forceinline__ float gelu(float x) { return x * normcdff(x); }
__device__ __forceinline__ float gelu_slope(float x) {
  return normcdff(x) + x * 0.3989422804014327f * __expf(-0.5f * x * x);
}

struct RowsTile {
  int expert, row0, n_rows, column0, n_columns;
};

// Finds this block's tile, false if there is none. Tiles of the same rows are neighbors.
__device__ __forceinline__ bool find_tile(const RowsProduct& p, RowsTile& tile) {
  const int n_column_tiles = (p.d_out + TILE - 1) / TILE;
  const int index = blockIdx.x / n_column_tiles;
  if (index >= *p.n_tiles) return false;
  const int4 of_rows = p.tiles[index];
  tile.expert = of_rows.x;
  tile.row0 = of_rows.y;
  tile.n_rows = of_rows.z - of_rows.y;
  tile.column0 = (blockIdx.x % n_column_tiles) * TILE;
  tile.n_columns = min(TILE, p.d_out - tile.column0);
  return true;
}

template <bool IS_TRANSPOSED>
__device__ __forceinline__ void rows_product(const RowsProduct& p, const RowsTile& tile, Sums& sums, u16* shared) {
  const InnerPlace inner(threadIdx.x);
  const OuterPlace outer(threadIdx.x);
  const u32 pieces_in = p.d_in / 8, pieces_out = p.d_out / 8;
  u32 x_pieces[N_PIECES];
#pragma unroll
  for (int i = 0; i < N_PIECES; i++) {
    const int row = inner.row + 16 * i;
    x_pieces[i] = NO_SOURCE;
    if (row < tile.n_rows) {
      const u32 source = p.sources == nullptr ? u32(tile.row0 + row) : u32(p.sources[tile.row0 + row]);
      x_pieces[i] = source * pieces_in + inner.piece;
    }
  }
  const u16* weight = p.weight + i64(tile.expert) * p.d_in * p.d_out;
  const auto load = [&](int step, u32 stage) {
    const u32 piece0 = step * (STEP / 8);
    const bool is_inside = piece0 + inner.piece < pieces_in;
#pragma unroll
    for (int i = 0; i < N_PIECES; i++) {
      const bool is_valid = is_inside && x_pieces[i] != NO_SOURCE;
      copy_async(inner.at(stage, i), p.x + (is_valid ? i64(x_pieces[i] + piece0) * 8 : 0), is_valid);
    }
#pragma unroll
    for (int i = 0; i < N_PIECES; i++) {
      if constexpr (IS_TRANSPOSED) {
        const u32 column = tile.column0 + inner.row + 16 * i;
        const bool is_valid = is_inside && column < p.d_out;
        const u32 piece = column * pieces_in + piece0 + inner.piece;
        copy_async(inner.at(stage + OPERAND_BYTES, i), weight + (is_valid ? i64(piece) * 8 : 0), is_valid);
      } else {
        const u32 row = step * STEP + outer.row + 8 * i;
        const u32 column_piece = tile.column0 / 8 + outer.piece;
        const bool is_valid = row < p.d_in && column_piece < pieces_out;
        const u32 piece = row * pieces_out + column_piece;
        copy_async(outer.at(stage + OPERAND_BYTES, i), weight + (is_valid ? i64(piece) * 8 : 0), is_valid);
      }
    }
  };
  contract<false, !IS_TRANSPOSED>(sums, shared_address(shared), (p.d_in + STEP - 1) / STEP, load);
}

template <bool IS_TRANSPOSED>
__device__ __forceinline__ void plain_product(const RowsProduct& p) {
  RowsTile tile;
  if (!find_tile(p, tile)) return;
  Sums sums = {};
  rows_product<IS_TRANSPOSED>(p, tile, sums, shared_memory);
  each_pair(sums, [&](int row, int column, float first, float second) {
    staged_pair(shared_memory, row, column) = pack(first, second);
  });
  __syncthreads();
  store_tile(shared_memory, p.y + i64(tile.row0) * p.d_out + tile.column0, p.d_out, tile.n_rows, tile.n_columns);
}

// What becomes of a tile of sums, the first of whose elements is row 0 and column `column0` of the block's rows.
struct Stored {
  u16* y;
  int n_rows, d_out;
  __device__ __forceinline__ void operator()(const Sums& sums, int column0) {
    each_piece(
        sums, [](int) { return 1.f; },
        [&](int row, int column, uint4 piece) {
          if (row < n_rows && column0 + column < d_out)
            *reinterpret_cast<uint4*>(y + i64(row) * d_out + column0 + column) = piece;
        });
  }
};

// As `plain_product` for a `d_in` of at most two steps, one block for all columns of its rows. The rows stay in shared
// memory and the matrix passes by in a ring of its own, which goes on loading while a tile of results is written: with
// two steps a tile, waiting for the first operands would otherwise take as long as the work.
constexpr int N_RING = 4;

template <bool IS_TRANSPOSED, typename Write>
__device__ __forceinline__ void wide_product(const RowsProduct& p, int4 of_rows, Write& write) {
  const int row0 = of_rows.y, n_rows = of_rows.z - of_rows.y;
  const InnerPlace inner(threadIdx.x);
  const OuterPlace outer(threadIdx.x);
  const u32 pieces_in = p.d_in / 8, pieces_out = p.d_out / 8;
  const u32 left = shared_address(shared_memory), ring = left + 2 * OPERAND_BYTES;
  const int n_steps = (p.d_in + STEP - 1) / STEP;
  const int n_loads = n_steps * ((p.d_out + TILE - 1) / TILE);

#pragma unroll
  for (int i = 0; i < N_PIECES; i++) {
    const int row = inner.row + 16 * i;
    const bool is_row = row < n_rows;
    const i64 source = !is_row ? 0 : p.sources == nullptr ? row0 + row : p.sources[row0 + row];
    for (int step = 0; step < n_steps; step++) {
      const u32 piece = step * (STEP / 8) + inner.piece;
      const bool is_valid = is_row && piece < pieces_in;
      const u16* from = p.x + (is_valid ? source * p.d_in + piece * 8 : 0);
      copy_async(inner.at(left + step * OPERAND_BYTES, i), from, is_valid);
    }
  }
  const u16* weight = p.weight + i64(of_rows.x) * p.d_in * p.d_out;
  const auto load = [&](int index) {
    const int step = n_steps == 1 ? 0 : index & 1, column0 = (n_steps == 1 ? index : index >> 1) * TILE;
    const u32 to = ring + index % N_RING * OPERAND_BYTES;
#pragma unroll
    for (int i = 0; i < N_PIECES; i++) {
      if constexpr (IS_TRANSPOSED) {
        const u32 column = column0 + inner.row + 16 * i, in_piece = step * (STEP / 8) + inner.piece;
        const bool is_valid = in_piece < pieces_in && column < p.d_out;
        copy_async(inner.at(to, i), weight + (is_valid ? i64(column * pieces_in + in_piece) * 8 : 0), is_valid);
      } else {
        const u32 row = step * STEP + outer.row + 8 * i, column_piece = column0 / 8 + outer.piece;
        const bool is_valid = row < p.d_in && column_piece < pieces_out;
        copy_async(outer.at(to, i), weight + (is_valid ? i64(row * pieces_out + column_piece) * 8 : 0), is_valid);
      }
    }
  };
  for (int index = 0; index < N_RING - 1; index++) {
    if (index < n_loads) load(index);
    commit_copies();
  }
  Sums sums = {};
  for (int index = 0; index < n_loads; index++) {
    wait_for_copies<N_RING - 2>();
    __syncthreads();
    if (index + N_RING - 1 < n_loads) load(index + N_RING - 1);
    commit_copies();
    const int step = n_steps == 1 ? 0 : index & 1;
    multiply<false, !IS_TRANSPOSED>(sums, left + step * OPERAND_BYTES, ring + index % N_RING * OPERAND_BYTES);
    if (step + 1 < n_steps) continue;
    const int column0 = (n_steps == 1 ? index : index >> 1) * TILE;
    write(sums, column0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int element = 0; element < 4; element++) sums[i][j][element] = 0.f;
      }
    }
  }
}

template <bool IS_TRANSPOSED>
__device__ __forceinline__ void stored_wide_product(const RowsProduct& p) {
  if (blockIdx.x >= *p.n_tiles) return;
  const int4 of_rows = p.tiles[blockIdx.x];
  Stored stored{p.y + i64(of_rows.y) * p.d_out, of_rows.z - of_rows.y, p.d_out};
  wide_product<IS_TRANSPOSED>(p, of_rows, stored);
}

// y = x[source] · weight[expert]
extern "C" __global__ void __launch_bounds__(N_THREADS, 2) product_wide(const __grid_constant__ RowsProduct p) {
  stored_wide_product<false>(p);
}

// y = x[source] · weight[expert]ᵀ
extern "C" __global__ void __launch_bounds__(N_THREADS, 2)
    product_wide_transposed(const __grid_constant__ RowsProduct p) {
  stored_wide_product<true>(p);
}

// y = x[source] · weight[expert]
extern "C" __global__ void __launch_bounds__(N_THREADS, 2) product(const __grid_constant__ RowsProduct p) {
  plain_product<false>(p);
}

// y = x[source] · weight[expert]ᵀ
extern "C" __global__ void __launch_bounds__(N_THREADS, 2) product_transposed(const __grid_constant__ RowsProduct p) {
  plain_product<true>(p);
}

template <bool VALUE>
struct Constant {
  static constexpr bool value = VALUE;
};

// Calls `body(Constant)`, which says whether the activation is ReLU.
template <typename Body>
__device__ __forceinline__ void with_activation(const RowsProduct& p, const Body& body) {
  if (p.activation == RELU) {
    body(Constant<true>());
  } else {
    body(Constant<false>());
  }
}

// Two neighboring sums with their bias; `bias` is that of the tile, or null.
__device__ __forceinline__ float2 add_bias(const RowsTile& tile, const u16* bias, int column, float2 sums) {
  if (bias != nullptr && column < tile.n_columns) {
    const float2 shift = unpack(*reinterpret_cast<const u32*>(bias + column));
    sums.x += shift.x;
    sums.y += shift.y;
  }
  return sums;
}

template <bool IS_RELU>
__device__ __forceinline__ u32 activate_pair(float2 hidden) {
  return IS_RELU ? pack(fmaxf(hidden.x, 0.f), fmaxf(hidden.y, 0.f)) : pack(gelu(hidden.x), gelu(hidden.y));
}

// gate · act(hidden) of two neighbors, from what `up` left.
template <bool IS_RELU>
__device__ __forceinline__ u32 weighted_pair(float gate, u32 kept) {
  const float2 hidden = unpack(kept);
  return IS_RELU ? pack(gate * hidden.x, gate * hidden.y) : pack(gate * gelu(hidden.x), gate * gelu(hidden.y));
}

// What `down_backward` makes of two neighboring sums and of what `up` left of them: gradients of the arguments of the
// activation, in `grads`, and their part of the gate's gradient.
template <bool IS_RELU>
__device__ __forceinline__ float differentiate_pair(float gate, u32 kept, float2 sums, u32& grads) {
  const float2 hidden = unpack(kept);
  float2 active, slope;
  if constexpr (IS_RELU) {
    active = hidden;
    slope = make_float2(hidden.x > 0.f ? 1.f : 0.f, hidden.y > 0.f ? 1.f : 0.f);
  } else {
    active = make_float2(gelu(hidden.x), gelu(hidden.y));
    slope = make_float2(gelu_slope(hidden.x), gelu_slope(hidden.y));
  }
  grads = pack(gate * sums.x * slope.x, gate * sums.y * slope.y);
  return active.x * sums.x + active.y * sums.y;
}

// hidden = x[source] · weight[expert] (+ bias[expert]),  y = act(hidden)
extern "C" __global__ void __launch_bounds__(N_THREADS, 2) up(const __grid_constant__ RowsProduct p) {
  RowsTile tile;
  if (!find_tile(p, tile)) return;
  Sums sums = {};
  rows_product<false>(p, tile, sums, shared_memory);

  u16* staged_y = shared_memory;
  u16* staged_hidden = shared_memory + TILE * STAGED_PITCH;
  const u16* bias = p.bias == nullptr ? nullptr : p.bias + i64(tile.expert) * p.d_out + tile.column0;
  // One branch for the tile, not one for each pair: the unrolled code of GELU is long.
  with_activation(p, [&](auto is_relu) {
    constexpr bool IS_RELU = decltype(is_relu)::value;
    each_pair(sums, [&](int row, int column, float first, float second) {
      const float2 shifted = add_bias(tile, bias, column, make_float2(first, second));
      if (p.hidden != nullptr) staged_pair(staged_hidden, row, column) = pack(shifted.x, shifted.y);
      staged_pair(staged_y, row, column) = activate_pair<IS_RELU>(shifted);
    });
  });
  __syncthreads();
  const i64 at = i64(tile.row0) * p.d_out + tile.column0;
  store_tile(staged_y, p.y + at, p.d_out, tile.n_rows, tile.n_columns);
  if (p.hidden != nullptr) store_tile(staged_hidden, p.hidden + at, p.d_out, tile.n_rows, tile.n_columns);
}

// With u = x[source] · weight[expert]ᵀ, x the gradient of the layer's result, and g the gate of the row:
//
//   y = g · u · act'(hidden),   weighted = g · act(hidden),   gate_grads[tile column, selection] = Σ act(hidden) · u
extern "C" __global__ void __launch_bounds__(N_THREADS, 2) down_backward(const __grid_constant__ RowsProduct p) {
  RowsTile tile;
  if (!find_tile(p, tile)) return;
  Sums sums = {};
  rows_product<true>(p, tile, sums, shared_memory);

  u16* staged_y = shared_memory;
  u16* staged_weighted = shared_memory + TILE * STAGED_PITCH;
  float* dots = reinterpret_cast<float*>(staged_weighted + TILE * STAGED_PITCH);
  float* gates = dots + 2 * TILE;
  const i64 at = i64(tile.row0) * p.d_out + tile.column0;
  const OuterPlace place(threadIdx.x);
  for (int row = place.row; row < TILE; row += 8) {
    const bool is_valid = row < tile.n_rows && place.piece * 8 < tile.n_columns;
    const u16* from = p.hidden + (is_valid ? at + i64(row) * p.d_out + place.piece * 8 : 0);
    copy_async(shared_address(staged_y + row * STAGED_PITCH + place.piece * 8), from, is_valid);
  }
  commit_copies();
  const i64 selection = threadIdx.x < tile.n_rows ? p.order[tile.row0 + threadIdx.x] : -1;
  gates[threadIdx.x] = selection < 0 ? 0.f : p.gates[selection];
  wait_for_copies<0>();
  __syncthreads();

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  with_activation(p, [&](auto is_relu) {
    constexpr bool IS_RELU = decltype(is_relu)::value;
    float dot = 0.f;
    each_pair(sums, [&](int row, int column, float first, float second) {
      u32& staged = staged_pair(staged_y, row, column);
      staged_pair(staged_weighted, row, column) = weighted_pair<IS_RELU>(gates[row], staged);
      dot += differentiate_pair<IS_RELU>(gates[row], staged, make_float2(first, second), staged);
      // The last pair of a row: `each_pair` goes through a row's columns before the next row.
      if ((column & 63) >= 56) {
        dot += __shfl_xor_sync(0xffffffffu, dot, 1);
        dot += __shfl_xor_sync(0xffffffffu, dot, 2);
        if ((lane & 3) == 0) dots[(warp >> 1) * TILE + row] = dot;
        dot = 0.f;
      }
    });
  });
  __syncthreads();
  store_tile(staged_y, p.y + at, p.d_out, tile.n_rows, tile.n_columns);
  store_tile(staged_weighted, p.weighted + at, p.d_out, tile.n_rows, tile.n_columns);
  if (selection >= 0)
    p.gate_grads[tile.column0 / TILE * p.n_rows + selection] = dots[threadIdx.x] + dots[TILE + threadIdx.x];
}

// ---------------------------------------------------------------------------------------------------------------------
// Products over the rows of an expert
// ---------------------------------------------------------------------------------------------------------------------

struct OuterProduct {
  // Both operands as `x` of RowsProduct; [.., d_left] and [.., d_right].
  const u16* left;
  const int* left_sources;
  const u16* right;
  const int* right_sources;
  const int* ends;
  // [n_splits, n_experts, d_left, d_right], in fp32 if `is_wide`.
  void* y;
  int d_left, d_right;
  int is_wide;
  int n_experts, n_splits;
  // Experts by their numbers of rows, most first: the longest sums start first, so that none is left alone at the end.
  // Behind them a zero from which blocks count that take tiles one by one.
  int* ranked;
};

extern "C" __global__ void __launch_bounds__(256) rank_experts(const __grid_constant__ OuterProduct p) {
  int* counts = reinterpret_cast<int*>(shared_memory);
  for (int e = threadIdx.x; e < p.n_experts; e += blockDim.x) counts[e] = p.ends[e] - (e == 0 ? 0 : p.ends[e - 1]);
  __syncthreads();
  const int expert = blockIdx.x * blockDim.x + threadIdx.x;
  if (expert == 0) p.ranked[p.n_experts] = 0;
  if (expert >= p.n_experts) return;
  const int own = counts[expert];
  int rank = 0;
  for (int e = 0; e < p.n_experts; e++) rank += counts[e] > own || (counts[e] == own && e < expert);
  p.ranked[rank] = expert;
}

// y[split, expert] = Σ left[source]ᵀ · right[source] over one of `n_splits` neighboring parts of the expert's rows, in
// one fixed order
extern "C" __global__ void __launch_bounds__(N_THREADS, 2) outer_product(const __grid_constant__ OuterProduct p) {
  const int n_down = (p.d_left + TILE - 1) / TILE, n_across = (p.d_right + TILE - 1) / TILE;
  const int split = blockIdx.x % p.n_splits, tile_of_all = blockIdx.x / p.n_splits;
  const int expert = p.ranked[tile_of_all / (n_down * n_across)], tile = tile_of_all % (n_down * n_across);
  const int first = expert == 0 ? 0 : p.ends[expert - 1], last = p.ends[expert];
  const int steps_of_split = ((last - first + STEP - 1) / STEP + p.n_splits - 1) / p.n_splits;
  const int row0 = min(first + split * steps_of_split * STEP, last), end = min(row0 + steps_of_split * STEP, last);
  const int down0 = tile / n_across * TILE, across0 = tile % n_across * TILE;
  const OuterPlace place(threadIdx.x);
  const u32 left_piece = down0 / 8 + place.piece, right_piece = across0 / 8 + place.piece;
  const bool has_left = left_piece < p.d_left / 8, has_right = right_piece < p.d_right / 8;
  const int n_steps = (end - row0 + STEP - 1) / STEP;

  // Places of the rows of the step that is loaded next, read one step early.
  u32 left_next[N_PIECES], right_next[N_PIECES];
  const auto find_sources = [&](int step) {
#pragma unroll
    for (int i = 0; i < N_PIECES; i++) {
      const int row = row0 + step * STEP + place.row + 8 * i;
      const bool is_valid = row < end;
      left_next[i] = !is_valid ? NO_SOURCE : p.left_sources == nullptr ? row : p.left_sources[row];
      right_next[i] = !is_valid ? NO_SOURCE : p.right_sources == nullptr ? row : p.right_sources[row];
    }
  };
  find_sources(0);
  const auto load = [&](int step, u32 stage) {
#pragma unroll
    for (int i = 0; i < N_PIECES; i++) {
      const bool has_row = left_next[i] != NO_SOURCE;
      const bool is_left = has_row && has_left, is_right = has_row && has_right;
      copy_async(place.at(stage, i), p.left + (is_left ? i64(left_next[i]) * p.d_left + left_piece * 8 : 0), is_left);
      copy_async(place.at(stage + OPERAND_BYTES, i),
                 p.right + (is_right ? i64(right_next[i]) * p.d_right + right_piece * 8 : 0), is_right);
    }
    find_sources(step + 1);
  };
  Sums sums = {};
  contract<true, true>(sums, shared_address(shared_memory), n_steps, load);

  const int n_rows = min(TILE, p.d_left - down0), n_columns = min(TILE, p.d_right - across0);
  const i64 at = ((i64(split) * p.n_experts + expert) * p.d_left + down0) * p.d_right + across0;
  if (p.is_wide) {
    float* y = static_cast<float*>(p.y) + at;
    each_pair(sums, [&](int row, int column, float first, float second) {
      if (row < n_rows && column < n_columns)
        *reinterpret_cast<float2*>(y + i64(row) * p.d_right + column) = make_float2(first, second);
    });
  } else {
    each_pair(sums, [&](int row, int column, float first, float second) {
      staged_pair(shared_memory, row, column) = pack(first, second);
    });
    __syncthreads();
    store_tile(shared_memory, static_cast<u16*>(p.y) + at, p.d_right, n_rows, n_columns);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What goes from one order to the other: one thread for eight columns
// ---------------------------------------------------------------------------------------------------------------------

struct Pieces {
  // By row, [n_rows, width]; `by_source` is in the other order.
  u16* rows;
  u16* by_source;
  // Where each selection stands among the rows; the place of each row in `by_source`; the selection of each row.
  const i64* inverse;
  const int* sources;
  const i64* order;
  // By selection; null means 1.
  const float* gates;
  float* gate_grads;
  // By output of `sum_and_dot_rows`.
  const u16* x;
  i64 n_rows;
  int width;
  // Selections that are summed.
  int n_summed;
};

// by_source[i] = Σ_j gate[i, j] · rows[inverse[i, j]]
extern "C" __global__ void __launch_bounds__(256) sum_rows(const __grid_constant__ Pieces p) {
  const u32 n_pieces = p.width / 8;
  const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  const i64 at = index / n_pieces;
  if (at * p.n_summed >= p.n_rows) return;
  const i64 piece = index % n_pieces;
  float sums[8] = {};
#pragma unroll 4
  for (int j = 0; j < p.n_summed; j++) {
    const i64 selection = at * p.n_summed + j;
    const float gate = p.gates == nullptr ? 1.f : p.gates[selection];
    const uint4 values = reinterpret_cast<const uint4*>(p.rows)[p.inverse[selection] * n_pieces + piece];
    const u32 pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 pair = unpack(pairs[i]);
      sums[2 * i] += gate * pair.x;
      sums[2 * i + 1] += gate * pair.y;
    }
  }
  reinterpret_cast<uint4*>(p.by_source)[index] =
      make_uint4(pack(sums[0], sums[1]), pack(sums[2], sums[3]), pack(sums[4], sums[5]), pack(sums[6], sums[7]));
}

// The same, and gate_grads[i, j] = rows[inverse[i, j]] · x[i], for a few selections each; one warp for each i
constexpr int MAX_DOTS = 16;

extern "C" __global__ void __launch_bounds__(256) sum_and_dot_rows(const __grid_constant__ Pieces p) {
  const u32 n_pieces = p.width / 8;
  const int lane = threadIdx.x & 31;
  const i64 at = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const i64 first = at * p.n_summed;
  if (first >= p.n_rows) return;
  float dots[MAX_DOTS] = {};
  for (u32 piece = lane; piece < n_pieces; piece += 32) {
    const uint4 own = reinterpret_cast<const uint4*>(p.x)[at * n_pieces + piece];
    const u32 own_pairs[4] = {own.x, own.y, own.z, own.w};
    float sums[8] = {};
#pragma unroll
    for (int j = 0; j < MAX_DOTS; j++) {
      if (j >= p.n_summed) break;
      const float gate = p.gates[first + j];
      const uint4 values = reinterpret_cast<const uint4*>(p.rows)[p.inverse[first + j] * n_pieces + piece];
      const u32 pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 pair = unpack(pairs[i]), factor = unpack(own_pairs[i]);
        sums[2 * i] += gate * pair.x;
        sums[2 * i + 1] += gate * pair.y;
        dots[j] += pair.x * factor.x + pair.y * factor.y;
      }
    }
    reinterpret_cast<uint4*>(p.by_source)[at * n_pieces + piece] =
        make_uint4(pack(sums[0], sums[1]), pack(sums[2], sums[3]), pack(sums[4], sums[5]), pack(sums[6], sums[7]));
  }
#pragma unroll
  for (int j = 0; j < MAX_DOTS; j++) {
    if (j >= p.n_summed) break;
    for (int distance = 16; distance > 0; distance /= 2) dots[j] += __shfl_xor_sync(0xffffffffu, dots[j], distance);
    if (lane == 0) p.gate_grads[first + j] = dots[j];
  }
}

// rows[r] = gate of r · by_source[source of r]
extern "C" __global__ void __launch_bounds__(256) weigh_rows(const __grid_constant__ Pieces p) {
  const u32 n_pieces = p.width / 8;
  const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  const i64 row = index / n_pieces;
  if (row >= p.n_rows) return;
  const float gate = p.gates[p.order[row]];
  const uint4 values = reinterpret_cast<const uint4*>(p.by_source)[i64(p.sources[row]) * n_pieces + index % n_pieces];
  u32 pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = unpack(pairs[i]);
    pairs[i] = pack(gate * pair.x, gate * pair.y);
  }
  reinterpret_cast<uint4*>(p.rows)[index] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// gate_grads[selection of r] = rows[r] · by_source[source of r]; one warp for each row
extern "C" __global__ void __launch_bounds__(256) dot_rows(const __grid_constant__ Pieces p) {
  const u32 n_pieces = p.width / 8;
  const i64 row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= p.n_rows) return;
  const uint4* left = reinterpret_cast<const uint4*>(p.rows) + row * n_pieces;
  const uint4* right = reinterpret_cast<const uint4*>(p.by_source) + i64(p.sources[row]) * n_pieces;
  float sum = 0.f;
  for (u32 piece = threadIdx.x & 31; piece < n_pieces; piece += 32) {
    const uint4 a = left[piece], b = right[piece];
    const u32 as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 one = unpack(as[i]), other = unpack(bs[i]);
      sum += one.x * other.x + one.y * other.y;
    }
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if ((threadIdx.x & 31) == 0) p.gate_grads[p.order[row]] = sum;
}
