// What only GPUs of compute capability 9.0 have. Products by warpgroups: tensor cores read both operands from shared
// memory, and a block computes 256 × 128 results, so that operands pass through the L2 cache less often. And products
// whose rows the L2 cache adds, eight 16-bit numbers at a time. Compiled as an empty file for other GPUs.
//
// A block is a *crew* that stays for many tiles: one warpgroup copies operands into a ring in shared memory, two
// multiply. The loader goes on to the next tile while the others finish one, and these are independent of each other as
// far as the ring goes: one multiplies while the other writes. What limits these kernels is how much passes through the
// L2 cache.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int GROUP_THREADS = 256;
constexpr int N_LOADERS = 128;
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

// d = a · b (+ d) with a 64 × 16, b 16 × 128, spread over a warpgroup.
template <bool IS_LEFT_OUTER, bool IS_RIGHT_OUTER>
__device__ __forceinline__ void wgmma(float (&d)[64], unsigned long long a, unsigned long long b, bool is_added) {
  asm volatile(
      "{\n.reg .pred is_added;\nsetp.ne.b32 is_added, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
      "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"
      "%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, is_added, 1, 1, %67, %68;\n}"
      : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
      : "l"(a), "l"(b), "r"(int(is_added)), "n"(IS_LEFT_OUTER ? 1 : 0), "n"(IS_RIGHT_OUTER ? 1 : 0));
}

// Sums of a thread: two tiles of 64 × 128 of its warpgroup.
typedef float GroupSums[2][64];

// Where a loader copies an operand of WIDTH free elements to, by outer rows.
template <int WIDTH>
struct LoaderOuterPlace {
  static constexpr int N_ROWS = N_LOADERS * 8 / WIDTH;
  static constexpr int N_PASSES = STEP / N_ROWS;
  int row, piece;
  u32 address;
  __device__ __forceinline__ LoaderOuterPlace(int thread)
      : row(thread / (WIDTH / 8)),
        piece(thread % (WIDTH / 8)),
        address(piece / 8 * BLOCK_BYTES + row * 128 + ((piece % 8 ^ (row & 7)) << 4)) {}
  // Of the row N_ROWS·pass further down; pieces are permuted by the low three bits of its number.
  __device__ __forceinline__ u32 at(u32 operand, int pass) const {
    const int further = pass * N_ROWS;
    return operand + (address ^ (further & 7) << 4) + further * 128;
  }
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

// ---------------------------------------------------------------------------------------------------------------------
// A crew
// ---------------------------------------------------------------------------------------------------------------------

constexpr int CREW_THREADS = GROUP_THREADS + N_LOADERS;
// Registers of a thread that copies and of one that multiplies: 128 · 88 + 256 · 208 are the 384 · 168 of the launch.
#define FEWER_REGISTERS asm volatile("setmaxnreg.dec.sync.aligned.u32 88;" ::: "memory")
#define MORE_REGISTERS asm volatile("setmaxnreg.inc.sync.aligned.u32 208;" ::: "memory")

__device__ __forceinline__ void init_barrier(u32 barrier, int n_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(n_arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives when all copies that this thread has started are done.
__device__ __forceinline__ void arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_at(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred is_done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 is_done, [%0], %1;\n"
      "@is_done bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A ring of N stages, each with a barrier for "filled", by all loaders, and one for "free again", by all warps that
// multiply. Everyone goes round it with a place of their own.
constexpr int N_READERS = GROUP_THREADS / 32;

template <int N>
struct Ring {
  u32 barriers;
  int stage = 0;
  u32 round = 0;
  __device__ __forceinline__ explicit Ring(u32 barriers) : barriers(barriers) {}
  __device__ __forceinline__ void init(int thread) const {
    if (thread >= N) return;
    init_barrier(barriers + 8 * thread, N_LOADERS);
    init_barrier(barriers + 8 * (N + thread), N_READERS);
  }
  __device__ __forceinline__ void wait_until_free() const { wait_at(barriers + 8 * (N + stage), round ^ 1); }
  __device__ __forceinline__ void fill_after_copies() const { arrive_after_copies(barriers + 8 * stage); }
  // What others copied is made visible to the tensor cores.
  __device__ __forceinline__ void wait_until_filled() const {
    wait_at(barriers + 8 * stage, round);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __device__ __forceinline__ void release(int of_stage) const {
    if ((threadIdx.x & 31) == 0) arrive(barriers + 8 * (N + of_stage));
  }
  __device__ __forceinline__ void advance() {
    if (++stage == N) stage = 0, round ^= 1;
  }
};

// Which tiles a block computes: its own first, and then whatever tile is next when its loader gets there, so that tiles
// are computed in the order of their list, and no block is left with more work than others. One thread asks, all
// others are told. A place is used again after more tiles than the loader can be ahead of anyone.
constexpr int N_TOLD = 8;

struct Schedule {
  u32 barriers;
  int* told;
  int* counter;
  // Tiles of this block before the one at hand.
  int at = 0;
  __device__ __forceinline__ Schedule(u32 barriers, int* told, int* counter)
      : barriers(barriers), told(told), counter(counter) {}
  __device__ __forceinline__ void init(int thread) const {
    if (thread < N_TOLD) init_barrier(barriers + 8 * thread, 1);
  }
  // By one thread: the tile after the one at hand.
  __device__ __forceinline__ void tell_next() const {
    const int place = at % N_TOLD;
    told[place] = gridDim.x + atomicAdd(counter, 1);
    arrive(barriers + 8 * place);
  }
  __device__ __forceinline__ int next() {
    const int place = at % N_TOLD;
    wait_at(barriers + 8 * place, at / N_TOLD & 1);
    at++;
    return told[place];
  }
};

// Keeps the compiler from moving uses of sums across the start or the end of their products.
template <int N>
__device__ __forceinline__ void pin(float (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N_PENDING>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N_PENDING) : "memory");
}

// One tile's contraction by those who multiply. Of the 256 × 128 tile, or 128 × 256 if not IS_TALL, warpgroup w has
// rows 128·w, or columns. Calls `on_start()` when the first products run and `on_end()` when the last do.
template <bool IS_TALL, bool IS_LEFT_OUTER, bool IS_RIGHT_OUTER, typename OnStart, typename OnEnd>
__device__ __forceinline__ void contract_from_ring(GroupSums& sums, Ring<GROUP_STAGES>& ring, int n_steps,
                                                   const OnStart& on_start, const OnEnd& on_end) {
  const int group = threadIdx.x >> 7;
  const u32 left_of_group = IS_TALL ? group * 2 * BLOCK_BYTES : 0;
  const u32 right_of_group = (IS_TALL ? 4 : 2 + 2 * group) * BLOCK_BYTES;
  const u32 shared = shared_address(shared_memory);
  int last_stage = 0;
  for (int step = 0; step < n_steps; step++) {
    ring.wait_until_filled();
    const u32 stage = shared + ring.stage * GROUP_STAGE_BYTES;
    pin(sums[0]);
    pin(sums[1]);
    begin_products();
#pragma unroll
    for (int k = 0; k < STEP / 16; k++) {
      const u32 left = stage + left_of_group + contracted_offset<IS_LEFT_OUTER>(k);
      const auto right = descriptor<IS_RIGHT_OUTER>(stage + right_of_group + contracted_offset<IS_RIGHT_OUTER>(k));
#pragma unroll
      for (int half = 0; half < 2; half++)
        wgmma<IS_LEFT_OUTER, IS_RIGHT_OUTER>(sums[half], descriptor<IS_LEFT_OUTER>(left + half * BLOCK_BYTES), right,
                                             step > 0 || k > 0);
    }
    commit_products();
    // The products of the step before are done, so its stage may be filled.
    wait_for_products<1>();
    if (step > 0) ring.release(last_stage);
    last_stage = ring.stage;
    ring.advance();
    if (step == 0) on_start();
  }
  on_end();
  wait_for_products<0>();
  pin(sums[0]);
  pin(sums[1]);
  ring.release(last_stage);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows times the matrices of their experts
// ---------------------------------------------------------------------------------------------------------------------

// Where a loader copies an operand to, by inner rows: of the row 16·pass further down.
struct LoaderInnerPlace {
  static constexpr int N_ROWS = N_LOADERS / 8;
  int row, piece;
  u32 address;
  __device__ __forceinline__ LoaderInnerPlace(int thread)
      : row(thread >> 3), piece(thread & 7), address(row * 128 + ((piece ^ (row & 7)) << 4)) {}
  __device__ __forceinline__ u32 at(u32 operand, int pass) const { return operand + address + pass * N_ROWS * 128; }
};

constexpr int GROUP_ROWS = 256;

__device__ __forceinline__ RowsTile tile_at(const RowsProduct& p, int4 of_rows, int column_tile) {
  RowsTile tile;
  tile.expert = of_rows.x;
  tile.row0 = of_rows.y;
  tile.n_rows = of_rows.z - of_rows.y;
  tile.column0 = column_tile * TILE;
  tile.n_columns = min(TILE, p.d_out - tile.column0);
  return tile;
}

// The loader's part: operands of all steps of all tiles of this block.
template <bool IS_TRANSPOSED>
__device__ __forceinline__ void load_rows_and_weights(const RowsProduct& p, Ring<GROUP_STAGES> ring, Schedule schedule,
                                                      int n_tiles, int n_column_tiles) {
  const int thread = threadIdx.x - GROUP_THREADS;
  const LoaderInnerPlace inner(thread);
  const LoaderOuterPlace<TILE> outer(thread);
  const u32 pieces_in = p.d_in / 8, pieces_out = p.d_out / 8;
  const u32 shared = shared_address(shared_memory);
  const int n_steps = (p.d_in + STEP - 1) / STEP;
  constexpr int N_PASSES = GROUP_ROWS / inner.N_ROWS;

  // Sources of the next tile, found while this one is copied.
  u32 next_sources[N_PASSES];
  const auto find_sources = [&](int4 of_rows) {
#pragma unroll
    for (int i = 0; i < N_PASSES; i++) {
      const int row = of_rows.y + inner.row + inner.N_ROWS * i;
      next_sources[i] = row >= of_rows.z ? NO_SOURCE : p.sources == nullptr ? row : p.sources[row];
    }
  };
  int4 next_rows = p.tiles[blockIdx.x / n_column_tiles];
  find_sources(next_rows);
  for (int index = blockIdx.x, next = n_tiles; index < n_tiles; index = next) {
    const int4 of_rows = next_rows;
    const u32 column0 = index % n_column_tiles * TILE;
    u32 x_pieces[N_PASSES];
#pragma unroll
    for (int i = 0; i < N_PASSES; i++)
      x_pieces[i] = next_sources[i] == NO_SOURCE ? NO_SOURCE : next_sources[i] * pieces_in + inner.piece;
    const u16* weight = p.weight + i64(of_rows.x) * p.d_in * p.d_out;
    for (int step = 0; step < n_steps; step++) {
      const u32 stage = shared + ring.stage * GROUP_STAGE_BYTES, right = stage + GROUP_ROWS / 64 * BLOCK_BYTES;
      const u32 piece0 = step * (STEP / 8);
      const bool is_inside = piece0 + inner.piece < pieces_in;
      ring.wait_until_free();
#pragma unroll
      for (int i = 0; i < N_PASSES; i++) {
        const bool is_valid = is_inside && x_pieces[i] != NO_SOURCE;
        copy_async(inner.at(stage, i), p.x + (is_valid ? i64(x_pieces[i] + piece0) * 8 : 0), is_valid);
      }
      if constexpr (IS_TRANSPOSED) {
#pragma unroll
        for (int i = 0; i < TILE / inner.N_ROWS; i++) {
          const u32 column = column0 + inner.row + inner.N_ROWS * i;
          const bool is_valid = is_inside && column < p.d_out;
          const u32 piece = column * pieces_in + piece0 + inner.piece;
          copy_async(inner.at(right, i), weight + (is_valid ? i64(piece) * 8 : 0), is_valid);
        }
      } else {
#pragma unroll
        for (int i = 0; i < outer.N_PASSES; i++) {
          const u32 row = step * STEP + outer.row + outer.N_ROWS * i, column_piece = column0 / 8 + outer.piece;
          const bool is_valid = row < p.d_in && column_piece < pieces_out;
          copy_async(outer.at(right, i), weight + (is_valid ? i64(row * pieces_out + column_piece) * 8 : 0), is_valid);
        }
      }
      ring.fill_after_copies();
      ring.advance();
      // Waiting for memory here costs nothing as long as the ring is full.
      if (step == 0 && thread == 0) schedule.tell_next();
      if (step == min(1, n_steps - 1)) {
        next = schedule.next();
        if (next < n_tiles) next_rows = p.tiles[next / n_column_tiles];
      }
      if (step == min(2, n_steps - 1) && next < n_tiles) find_sources(next_rows);
    }
  }
  wait_for_copies<0>();
}

// All tiles of a block. `Finish` is made for each tile before its sums are there, prepares what it needs while the last
// products run, and then takes the sums.
template <bool IS_TRANSPOSED, typename Finish>
__device__ __forceinline__ void rows_by_crew(const RowsProduct& p) {
  __shared__ __align__(8) unsigned long long barriers[2 * GROUP_STAGES + N_TOLD];
  __shared__ int told[N_TOLD];
  Ring<GROUP_STAGES> ring(shared_address(barriers));
  Schedule schedule(shared_address(barriers + 2 * GROUP_STAGES), told, p.n_tiles + 1);
  ring.init(threadIdx.x);
  schedule.init(threadIdx.x);
  __syncthreads();
  const int n_column_tiles = (p.d_out + TILE - 1) / TILE;
  const int n_tiles = *p.n_tiles * n_column_tiles;
  if (int(blockIdx.x) >= n_tiles) return;
  if (threadIdx.x >= GROUP_THREADS) {
    FEWER_REGISTERS;
    load_rows_and_weights<IS_TRANSPOSED>(p, ring, schedule, n_tiles, n_column_tiles);
  } else {
    MORE_REGISTERS;
    const int n_steps = (p.d_in + STEP - 1) / STEP;
    GroupSums sums = {};
    int4 next_rows = p.tiles[blockIdx.x / n_column_tiles];
    for (int index = blockIdx.x, next = n_tiles; index < n_tiles; index = next) {
      const RowsTile tile = tile_at(p, next_rows, index % n_column_tiles);
      Finish finish(p, tile);
      const auto find_next = [&] {
        next = schedule.next();
        if (next < n_tiles) next_rows = p.tiles[next / n_column_tiles];
      };
      contract_from_ring<true, false, !IS_TRANSPOSED>(sums, ring, n_steps, find_next, [&] { finish.prepare(); });
      finish(sums);
    }
  }
}

// The i-th of the four rows of which a thread that multiplies has sums.
__device__ __forceinline__ int row_of_group(int i) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, group = threadIdx.x >> 7;
  return group * 128 + (i >> 1) * 64 + warp * 16 + (i & 1) * 8 + (lane >> 2);
}

// Calls `visit(i, row, part, sums)` for the eight sums of each of four parts of each row of this thread: four
// pairs, the j-th in the j-th eight columns of 32.
template <typename Visit>
__device__ __forceinline__ void each_group_part(GroupSums& sums, const Visit& visit) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int eighth = 0; eighth < 2; eighth++) {
      const int i = half * 2 + eighth;
#pragma unroll
      for (int part = 0; part < 4; part++) {
        float2 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int at = (part * 4 + j) * 4 + eighth * 2;
          pairs[j] = make_float2(sums[half][at], sums[half][at + 1]);
        }
        visit(i, row_of_group(i), part, pairs);
      }
    }
  }
}

// The first of the eight columns of `part` that a lane has once pairs are exchanged.
__device__ __forceinline__ int exchanged_column(int part) { return (part * 4 + (threadIdx.x & 3)) * 8; }

__device__ __forceinline__ void exchange_and_store(u32 (&pairs)[4], u16* to, bool is_valid) {
  exchange(pairs);
  if (is_valid) *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

struct StoreTile {
  const RowsProduct& p;
  const RowsTile tile;
  __device__ __forceinline__ StoreTile(const RowsProduct& p, const RowsTile& tile) : p(p), tile(tile) {}
  __device__ __forceinline__ void prepare() {}
  __device__ __forceinline__ void operator()(GroupSums& sums) {
    u16* y = p.y + i64(tile.row0) * p.d_out + tile.column0;
    each_group_part(sums, [&](int, int row, int part, const float2(&sums)[4]) {
      u32 pairs[4];
#pragma unroll
      for (int j = 0; j < 4; j++) pairs[j] = pack(sums[j].x, sums[j].y);
      const int column = exchanged_column(part);
      exchange_and_store(pairs, y + i64(row) * p.d_out + column, row < tile.n_rows && column < tile.n_columns);
    });
  }
};

struct Activate {
  const RowsProduct& p;
  const RowsTile tile;
  __device__ __forceinline__ Activate(const RowsProduct& p, const RowsTile& tile) : p(p), tile(tile) {}
  __device__ __forceinline__ void prepare() {}
  __device__ __forceinline__ void operator()(GroupSums& sums) {
    const i64 at = i64(tile.row0) * p.d_out + tile.column0;
    const u16* bias = p.bias == nullptr ? nullptr : p.bias + i64(tile.expert) * p.d_out + tile.column0;
    with_activation(p, [&](auto is_relu) {
      constexpr bool IS_RELU = decltype(is_relu)::value;
      each_group_part(sums, [&](int, int row, int part, const float2(&sums)[4]) {
        u32 active[4], hidden[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float2 shifted = add_bias(tile, bias, (part * 4 + j) * 8 + (threadIdx.x & 3) * 2, sums[j]);
          hidden[j] = pack(shifted.x, shifted.y);
          active[j] = activate_pair<IS_RELU>(shifted);
        }
        const int column = exchanged_column(part);
        const bool is_valid = row < tile.n_rows && column < tile.n_columns;
        const i64 to = at + i64(row) * p.d_out + column;
        exchange_and_store(active, p.y + to, is_valid);
        if (p.hidden != nullptr) exchange_and_store(hidden, p.hidden + to, is_valid);
      });
    });
  }
};

struct Differentiate {
  const RowsProduct& p;
  const RowsTile tile;
  i64 at;
  // Of the four rows of this thread.
  int selections[4];
  float gates[4];
  // What `up` left of two of them, as it lies in memory.
  uint4 hidden[2][4];

  __device__ __forceinline__ Differentiate(const RowsProduct& p, const RowsTile& tile)
      : p(p), tile(tile), at(i64(tile.row0) * p.d_out + tile.column0) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = row_of_group(i);
      selections[i] = row < tile.n_rows ? p.order[tile.row0 + row] : -1;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) gates[i] = selections[i] < 0 ? 0.f : p.gates[selections[i]];
  }

  __device__ __forceinline__ void read_hidden(int i) {
    const int row = row_of_group(i);
#pragma unroll
    for (int part = 0; part < 4; part++) {
      const int column = exchanged_column(part);
      const bool is_valid = row < tile.n_rows && column < tile.n_columns;
      hidden[i & 1][part] = make_uint4(0, 0, 0, 0);
      if (is_valid)
        hidden[i & 1][part] = *reinterpret_cast<const uint4*>(p.hidden + at + i64(row) * p.d_out + column);
    }
  }

  __device__ __forceinline__ void prepare() {
    read_hidden(0);
    read_hidden(1);
  }

  __device__ __forceinline__ void operator()(GroupSums& sums) {
    with_activation(p, [&](auto is_relu) {
      constexpr bool IS_RELU = decltype(is_relu)::value;
      float dot = 0.f;
      each_group_part(sums, [&](int i, int row, int part, const float2(&sums)[4]) {
        const uint4 piece = hidden[i & 1][part];
        u32 kept[4] = {piece.x, piece.y, piece.z, piece.w}, weighted[4], grads[4];
        const float gate = gates[i];
#pragma unroll
        for (int j = 0; j < 4; j++) weighted[j] = weighted_pair<IS_RELU>(gate, kept[j]);
        exchange(kept);
#pragma unroll
        for (int j = 0; j < 4; j++) dot += differentiate_pair<IS_RELU>(gate, kept[j], sums[j], grads[j]);
        const int column = exchanged_column(part);
        const bool is_valid = row < tile.n_rows && column < tile.n_columns;
        const i64 to = at + i64(row) * p.d_out + column;
        exchange_and_store(grads, p.y + to, is_valid);
        if (is_valid)
          *reinterpret_cast<uint4*>(p.weighted + to) = make_uint4(weighted[0], weighted[1], weighted[2], weighted[3]);
        if (part < 3) return;
        if (i < 2) read_hidden(i + 2);
        dot += __shfl_xor_sync(0xffffffffu, dot, 1);
        dot += __shfl_xor_sync(0xffffffffu, dot, 2);
        if ((threadIdx.x & 3) == 0 && selections[i] >= 0)
          p.gate_grads[tile.column0 / TILE * p.n_rows + selections[i]] = dot;
        dot = 0.f;
      });
    });
  }
};

// As `product`, and the others as their namesakes, with tiles of 256 rows.
extern "C" __global__ void __launch_bounds__(CREW_THREADS, 1)
    product_in_groups(const __grid_constant__ RowsProduct p) {
  rows_by_crew<false, StoreTile>(p);
}

extern "C" __global__ void __launch_bounds__(CREW_THREADS, 1)
    product_transposed_in_groups(const __grid_constant__ RowsProduct p) {
  rows_by_crew<true, StoreTile>(p);
}

extern "C" __global__ void __launch_bounds__(CREW_THREADS, 1) up_in_groups(const __grid_constant__ RowsProduct p) {
  rows_by_crew<false, Activate>(p);
}

extern "C" __global__ void __launch_bounds__(CREW_THREADS, 1)
    down_backward_in_groups(const __grid_constant__ RowsProduct p) {
  rows_by_crew<true, Differentiate>(p);
}

// ---------------------------------------------------------------------------------------------------------------------
// Products over the rows of an expert
// ---------------------------------------------------------------------------------------------------------------------

// What a block of `outer_product` computes of p.
template <bool IS_TALL>
struct OuterTile {
  static constexpr int DOWN = IS_TALL ? 256 : 128, ACROSS = IS_TALL ? 128 : 256;
  int split, expert, row0, end, down0, across0;

  static __device__ __forceinline__ int count(const OuterProduct& p) {
    return p.n_splits * p.n_experts * ((p.d_left + DOWN - 1) / DOWN) * ((p.d_right + ACROSS - 1) / ACROSS);
  }

  __device__ __forceinline__ OuterTile(const OuterProduct& p, int index) {
    const int n_down = (p.d_left + DOWN - 1) / DOWN, n_across = (p.d_right + ACROSS - 1) / ACROSS;
    const int tile_of_all = index / p.n_splits, tile = tile_of_all % (n_down * n_across);
    split = index % p.n_splits;
    expert = p.ranked[tile_of_all / (n_down * n_across)];
    const int first = expert == 0 ? 0 : p.ends[expert - 1], last = p.ends[expert];
    const int steps_of_split = ((last - first + STEP - 1) / STEP + p.n_splits - 1) / p.n_splits;
    row0 = min(first + split * steps_of_split * STEP, last);
    end = min(row0 + steps_of_split * STEP, last);
    down0 = tile / n_across * DOWN;
    across0 = tile % n_across * ACROSS;
  }

  // At least one, of zeros if there are no rows: nobody gets further ahead of others than the ring is long.
  __device__ __forceinline__ int n_steps() const { return max(1, (end - row0 + STEP - 1) / STEP); }
};

template <bool IS_TALL>
__device__ __forceinline__ void load_columns(const OuterProduct& p, Ring<GROUP_STAGES> ring, Schedule schedule,
                                             int n_tiles) {
  using Tile = OuterTile<IS_TALL>;
  const int thread = threadIdx.x - GROUP_THREADS;
  const LoaderOuterPlace<Tile::DOWN> left_place(thread);
  const LoaderOuterPlace<Tile::ACROSS> right_place(thread);
  const u32 shared = shared_address(shared_memory);

  // Places of the rows of the step that is loaded next, read one step early.
  u32 left_next[left_place.N_PASSES], right_next[right_place.N_PASSES];
  const auto find_sources = [&](int row0, int end) {
#pragma unroll
    for (int i = 0; i < left_place.N_PASSES; i++) {
      const int row = row0 + left_place.row + left_place.N_ROWS * i;
      left_next[i] = row >= end ? NO_SOURCE : p.left_sources == nullptr ? row : p.left_sources[row];
    }
#pragma unroll
    for (int i = 0; i < right_place.N_PASSES; i++) {
      const int row = row0 + right_place.row + right_place.N_ROWS * i;
      right_next[i] = row >= end ? NO_SOURCE : p.right_sources == nullptr ? row : p.right_sources[row];
    }
  };
  Tile tile(p, blockIdx.x);
  find_sources(tile.row0, tile.end);
  for (int index = blockIdx.x; index < n_tiles;) {
    const int n_steps = tile.n_steps();
    const u32 left_piece = tile.down0 / 8 + left_place.piece, right_piece = tile.across0 / 8 + right_place.piece;
    const bool has_left = left_piece < p.d_left / 8, has_right = right_piece < p.d_right / 8;
    for (int step = 0; step < n_steps; step++) {
      const u32 stage = shared + ring.stage * GROUP_STAGE_BYTES;
      ring.wait_until_free();
#pragma unroll
      for (int i = 0; i < left_place.N_PASSES; i++) {
        const bool is_valid = has_left && left_next[i] != NO_SOURCE;
        copy_async(left_place.at(stage, i), p.left + (is_valid ? i64(left_next[i]) * p.d_left + left_piece * 8 : 0),
                   is_valid);
      }
#pragma unroll
      for (int i = 0; i < right_place.N_PASSES; i++) {
        const bool is_valid = has_right && right_next[i] != NO_SOURCE;
        copy_async(right_place.at(stage + Tile::DOWN / 64 * BLOCK_BYTES, i),
                   p.right + (is_valid ? i64(right_next[i]) * p.d_right + right_piece * 8 : 0), is_valid);
      }
      ring.fill_after_copies();
      ring.advance();
      // Waiting for memory here costs nothing as long as the ring is full.
      if (step == 0 && thread == 0) schedule.tell_next();
      if (step + 1 < n_steps) {
        find_sources(tile.row0 + (step + 1) * STEP, tile.end);
      } else {
        index = schedule.next();
        if (index < n_tiles) {
          tile = Tile(p, index);
          find_sources(tile.row0, tile.end);
        }
      }
    }
  }
  wait_for_copies<0>();
}

// As `outer_product`.
template <bool IS_TALL>
__device__ __forceinline__ void outer_product_by_crew(const OuterProduct& p) {
  using Tile = OuterTile<IS_TALL>;
  __shared__ __align__(8) unsigned long long barriers[2 * GROUP_STAGES + N_TOLD];
  __shared__ int told[N_TOLD];
  Ring<GROUP_STAGES> ring(shared_address(barriers));
  Schedule schedule(shared_address(barriers + 2 * GROUP_STAGES), told, p.ranked + p.n_experts);
  ring.init(threadIdx.x);
  schedule.init(threadIdx.x);
  __syncthreads();
  const int n_tiles = Tile::count(p);
  if (threadIdx.x >= GROUP_THREADS) {
    FEWER_REGISTERS;
    load_columns<IS_TALL>(p, ring, schedule, n_tiles);
  } else {
    MORE_REGISTERS;
    GroupSums sums = {};
    for (int index = blockIdx.x, next = n_tiles; index < n_tiles; index = next) {
      const Tile tile(p, index);
      const auto find_next = [&] { next = schedule.next(); };
      contract_from_ring<IS_TALL, true, true>(sums, ring, tile.n_steps(), find_next, [] {});

      const int n_rows = p.d_left - tile.down0, n_columns = p.d_right - tile.across0;
      const i64 at = ((i64(tile.split) * p.n_experts + tile.expert) * p.d_left + tile.down0) * p.d_right + tile.across0;
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
  }
}

extern "C" __global__ void __launch_bounds__(CREW_THREADS, 1)
    outer_product_tall(const __grid_constant__ OuterProduct p) {
  outer_product_by_crew<true>(p);
}

extern "C" __global__ void __launch_bounds__(CREW_THREADS, 1)
    outer_product_broad(const __grid_constant__ OuterProduct p) {
  outer_product_by_crew<false>(p);
}

// ---------------------------------------------------------------------------------------------------------------------
// Products of at most 128 contracted elements, all columns of 256 rows in one block
// ---------------------------------------------------------------------------------------------------------------------

// Rows stay in shared memory, the next ones beside them, while the matrix passes by in a ring of 64 columns. Products
// of the next columns run while those of the last are written.
constexpr int N_STRIPS = 5;
constexpr int STRIP = 64;
constexpr int STRIP_BYTES = 2 * BLOCK_BYTES;
constexpr int ROWS_BYTES = 2 * GROUP_ROWS / 64 * BLOCK_BYTES;

// d = a · b (+ d) with a 64 × 16, b 16 × 64.
template <bool IS_RIGHT_OUTER>
__device__ __forceinline__ void wgmma_narrow(float (&d)[32], unsigned long long a, unsigned long long b,
                                             bool is_added) {
  asm volatile(
      "{\n.reg .pred is_added;\nsetp.ne.b32 is_added, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
      "%29,%30,%31}, %32, %33, is_added, 1, 1, 0, %35;\n}"
      : D8(0), D8(8), D8(16), D8(24)
      : "l"(a), "l"(b), "r"(int(is_added)), "n"(IS_RIGHT_OUTER ? 1 : 0));
}

typedef float StripSums[2][32];

template <bool IS_TRANSPOSED>
__device__ __forceinline__ void load_rows_then_strips(const RowsProduct& p, Ring<2> rows_ring, Ring<N_STRIPS> ring,
                                                      Schedule schedule, int n_tiles) {
  const int thread = threadIdx.x - GROUP_THREADS;
  const u32 pieces_in = p.d_in / 8, pieces_out = p.d_out / 8;
  const u32 shared = shared_address(shared_memory), strips = shared + 2 * ROWS_BYTES;
  const int n_strips = (p.d_out + STRIP - 1) / STRIP;
  // Rows of up to 128 contracted elements, 16 lanes each, and blocks of 64 elements side by side.
  const int row = thread >> 4, piece = thread & 15;
  const bool has_piece = piece < pieces_in;
  const u32 swizzled = row * 128 + ((piece % 8 ^ row) << 4);
  const LoaderInnerPlace outer(thread);

  const auto load_rows = [&](int4 of_rows) {
    rows_ring.wait_until_free();
    const u32 to = shared + rows_ring.stage * ROWS_BYTES + piece / 8 * (ROWS_BYTES / 2) + swizzled;
#pragma unroll 8
    for (int i = 0; i < GROUP_ROWS / 8; i++) {
      const int at = of_rows.y + row + 8 * i;
      const bool is_valid = has_piece && at < of_rows.z;
      const i64 source = !is_valid ? 0 : p.sources == nullptr ? at : p.sources[at];
      copy_async(to + i * 1024, p.x + (is_valid ? source * p.d_in + piece * 8 : 0), is_valid);
    }
    rows_ring.fill_after_copies();
    rows_ring.advance();
  };
  int4 next_rows = p.tiles[blockIdx.x];
  load_rows(next_rows);
  for (int index = blockIdx.x, next = n_tiles; index < n_tiles; index = next) {
    const u16* weight = p.weight + i64(next_rows.x) * p.d_in * p.d_out;
    for (int strip = 0; strip < n_strips; strip++) {
      ring.wait_until_free();
      const u32 to = strips + ring.stage * STRIP_BYTES;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if constexpr (IS_TRANSPOSED) {
          const u32 column = strip * STRIP + row + 8 * i;
          const bool is_valid = has_piece && column < p.d_out;
          const u32 from = column * pieces_in + piece;
          copy_async(to + piece / 8 * BLOCK_BYTES + swizzled + i * 1024, weight + (is_valid ? i64(from) * 8 : 0),
                     is_valid);
        } else {
          const u32 row = outer.row + outer.N_ROWS * i, column_piece = strip * (STRIP / 8) + outer.piece;
          const bool is_valid = row < p.d_in && column_piece < pieces_out;
          const u32 from = row * pieces_out + column_piece;
          copy_async(outer.at(to, i), weight + (is_valid ? i64(from) * 8 : 0), is_valid);
        }
      }
      ring.fill_after_copies();
      ring.advance();
      if (strip == 0 && thread == 0) schedule.tell_next();
      if (strip == min(1, n_strips - 1)) {
        next = schedule.next();
        if (next < n_tiles) next_rows = p.tiles[next];
      }
      // By then the rows of the tile before are no longer read.
      if (strip == min(N_STRIPS, n_strips - 1) && next < n_tiles) load_rows(next_rows);
    }
  }
  wait_for_copies<0>();
}

// 64 columns of a tile of this block.
struct Strip {
  int index, strip;
};

// `Write` is made for each tile and takes sums of 64 columns of it.
template <bool IS_TRANSPOSED, typename Write>
__device__ __forceinline__ void wide_rows_by_crew(const RowsProduct& p) {
  __shared__ __align__(8) unsigned long long barriers[2 * N_STRIPS + 4 + N_TOLD];
  __shared__ int told[N_TOLD];
  Ring<N_STRIPS> ring(shared_address(barriers));
  Ring<2> rows_ring(shared_address(barriers + 2 * N_STRIPS));
  Schedule schedule(shared_address(barriers + 2 * N_STRIPS + 4), told, p.n_tiles + 1);
  ring.init(threadIdx.x);
  rows_ring.init(threadIdx.x);
  schedule.init(threadIdx.x);
  __syncthreads();
  const int n_tiles = *p.n_tiles;
  if (int(blockIdx.x) >= n_tiles) return;
  if (threadIdx.x >= GROUP_THREADS) {
    FEWER_REGISTERS;
    load_rows_then_strips<IS_TRANSPOSED>(p, rows_ring, ring, schedule, n_tiles);
  } else {
    MORE_REGISTERS;
    const u32 rows = shared_address(shared_memory), strips = rows + 2 * ROWS_BYTES;
    const int group = threadIdx.x >> 7;
    const int n_strips = (p.d_out + STRIP - 1) / STRIP;

    const auto start = [&](StripSums& sums, int strip) {
      if (strip == 0) rows_ring.wait_until_filled();
      ring.wait_until_filled();
      const u32 left0 = rows + rows_ring.stage * ROWS_BYTES + group * 2 * BLOCK_BYTES;
      const u32 right0 = strips + ring.stage * STRIP_BYTES;
      pin(sums[0]);
      pin(sums[1]);
      begin_products();
#pragma unroll
      for (int step = 0; step < 2; step++) {
#pragma unroll
        for (int k = 0; k < STEP / 16; k++) {
          const u32 left = left0 + step * (ROWS_BYTES / 2) + contracted_offset<false>(k);
          const u32 right = right0 + step * BLOCK_BYTES + contracted_offset<!IS_TRANSPOSED>(k);
#pragma unroll
          for (int half = 0; half < 2; half++)
            wgmma_narrow<!IS_TRANSPOSED>(sums[half], descriptor<false>(left + half * BLOCK_BYTES),
                                         descriptor<!IS_TRANSPOSED>(right), step > 0 || k > 0);
        }
      }
      commit_products();
    };
    const auto end = [&](StripSums& sums, int strip) {
      wait_for_products<0>();
      pin(sums[0]);
      pin(sums[1]);
      ring.release(ring.stage);
      ring.advance();
      if (strip == n_strips - 1) {
        rows_ring.release(rows_ring.stage);
        rows_ring.advance();
      }
    };
    const auto next = [&](Strip at) {
      return at.strip + 1 < n_strips ? Strip{at.index, at.strip + 1} : Strip{schedule.next(), 0};
    };
    Strip at{int(blockIdx.x), 0};
    Write write(p, p.tiles[at.index]);
    // Ends the products of `these` and starts the next ones before it writes.
    const auto go_on = [&](StripSums& these, StripSums& others) {
      end(these, at.strip);
      const Strip after = next(at);
      const bool has_next = after.index < n_tiles;
      if (has_next) start(others, after.strip);
      write(these, at.strip * STRIP);
      if (has_next && after.strip == 0) write = Write(p, p.tiles[after.index]);
      at = after;
      return has_next;
    };
    StripSums even = {}, odd = {};
    start(even, 0);
    while (go_on(even, odd) && go_on(odd, even)) {
    }
  }
}

// Eight neighboring results, to where they belong or added to what is there.
template <bool IS_ADDED>
__device__ __forceinline__ void put(u16* to, const u32 (&pairs)[4]) {
  if constexpr (IS_ADDED) {
#ifdef IS_F16
    asm volatile("red.global.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};"
#else
    asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};"
#endif
                 ::"l"(to), "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                 : "memory");
  } else {
    *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

// 64 columns of a tile of sums, to the rows of `y` that are theirs, or if they are to be added times their gates to
// those of their targets.
template <bool IS_ADDED>
struct PutStrip {
  u16* y;
  int d_out;
  // Of the four rows of this thread; negative if there is none.
  int targets[4];
  float factors[4];

  __device__ __forceinline__ PutStrip(const RowsProduct& p, int4 of_rows) : y(p.y), d_out(p.d_out) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = of_rows.y + row_of_group(i);
      const bool is_valid = row < of_rows.z;
      targets[i] = !is_valid ? -1 : IS_ADDED ? p.targets[row] : row;
      factors[i] = IS_ADDED && is_valid && p.gates != nullptr ? p.gates[p.order[row]] : 1.f;
    }
  }

  __device__ __forceinline__ void operator()(StripSums& sums, int column0) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u16* row = y + i64(targets[i]) * d_out;
#pragma unroll
      for (int part = 0; part < 2; part++) {
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int at = (part * 4 + j) * 4 + (i & 1) * 2;
          pairs[j] = pack(factors[i] * sums[i >> 1][at], factors[i] * sums[i >> 1][at + 1]);
        }
        exchange(pairs);
        const int column = column0 + exchanged_column(part);
        if (targets[i] >= 0 && column < d_out) put<IS_ADDED>(row + column, pairs);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(CREW_THREADS, 1)
    product_wide_in_groups(const __grid_constant__ RowsProduct p) {
  wide_rows_by_crew<false, PutStrip<false>>(p);
}

extern "C" __global__ void __launch_bounds__(CREW_THREADS, 1)
    product_wide_transposed_in_groups(const __grid_constant__ RowsProduct p) {
  wide_rows_by_crew<true, PutStrip<false>>(p);
}

// y[target of r] += gate of r · (x[source of r] · weight[expert]), rounded to the element type at each addition, in
// whatever order blocks come to it. Rows of a result are close in time where tiles are listed by windows, so that it
// stays in the L2 cache, which adds. Nothing that is staged passes through memory.
extern "C" __global__ void __launch_bounds__(CREW_THREADS, 1) added_product(const __grid_constant__ RowsProduct p) {
  wide_rows_by_crew<false, PutStrip<true>>(p);
}

extern "C" __global__ void __launch_bounds__(CREW_THREADS, 1)
    added_product_transposed(const __grid_constant__ RowsProduct p) {
  wide_rows_by_crew<true, PutStrip<true>>(p);
}

#endif
