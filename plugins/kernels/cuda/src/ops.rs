//! The kernels as functions of tensors: shapes are checked, results allocated, launches queued on libtorch's stream.
//!
//! Shape letters: `M` rows (selections in the order of the experts), `E` experts, `A`/`B` widths, multiples of 8.

#![expect(unsafe_code, reason = "launches kernels on the memory of tensors")]

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use moeut_plugin_api::kernel::Activation;
use moeut_torch::padding::{ALIGNMENT_BYTES, padded_rows};
use moeut_torch::{FunctionError, cuda, determinism};
use tch::{Device, Kind, Tensor};

use crate::driver::LaunchShape;
use crate::module::{Entry, GROUP_SHARED_BYTES, Module, TILE_SHARED_BYTES, WIDE_SHARED_BYTES};

/// Rows and columns of a tile of results.
const TILE: i64 = 128;
const TILE_THREADS: u32 = 128;
/// The longer side of a tile of the kernels for warpgroups, and threads: two warpgroups multiply, one copies for them.
const GROUP_TILE: i64 = 256;
const CREW_THREADS: u32 = 384;
/// Threads of a block of `list_tiles`, which keeps as many experts together.
const LIST_THREADS: u32 = 1024;
/// Threads of a block of the kernels without tiles.
pub(crate) const THREADS: u32 = 256;
const WARP: i64 = 32;
/// Blocks that sum over rows at the same time on an H100, two on each multiprocessor.
const N_SLOTS: i64 = 264;
/// Selections of one row that [`Ops::sum_and_dot_rows`] takes.
pub(crate) const MAX_DOTS: i64 = 16;
/// Elements that a thread of those handles.
const PIECE: i64 = 8;

pub(crate) type Result<T> = std::result::Result<T, FunctionError>;

/// In which order row tiles are computed.
#[derive(Clone, Copy)]
pub(crate) enum Order<'a> {
    /// All tiles of an expert, so that its matrix is read once: for rows that lie in the order of the experts.
    Experts,
    /// Tiles that begin in one window of what rows are read from, or added to, then those of the next: the L2 cache
    /// holds a window, and each of them reads all matrices.
    Windows {
        /// int32 `[M]`, ascending within an expert.
        sources: &'a Tensor,
        n_sources: i64,
        /// Sources of a window.
        window: i64,
        /// Whether no tile reaches into the next window: there are more tiles, and a window is smaller.
        is_cut: bool,
    },
}

impl<'a> Order<'a> {
    /// For rows that are read by their sources. 26 MB was the best of 8 to 32 on an H100, with 65536 tokens of 1024
    /// channels, 16 of 387 experts.
    pub(crate) fn reading(rows: Rows<'a>) -> Self {
        const BYTES: i64 = 26 << 20;
        match rows.sources {
            Some(sources) => {
                let [n_sources, width] = [rows.x.size()[0], rows.x.size()[1]];
                Self::windows(sources, n_sources, width, BYTES, false)
            }
            None => Self::Experts,
        }
    }

    /// For rows `width` wide that are added to those of `targets`. 16 MB was the best of 8 to 26 likewise, and with
    /// 16384 tokens of 1536 channels, 24 of 565 experts.
    fn adding(targets: &'a Tensor, n_targets: i64, width: i64) -> Self {
        const BYTES: i64 = 16 << 20;
        Self::windows(targets, n_targets, width, BYTES, true)
    }

    /// Elements have 2 bytes.
    fn windows(sources: &'a Tensor, n_sources: i64, width: i64, bytes: i64, is_cut: bool) -> Self {
        Self::Windows {
            sources,
            n_sources,
            window: (bytes / (2 * width).max(1)).clamp(1, i64::from(i32::MAX)),
            is_cut,
        }
    }
}

/// Row tiles of all experts, a list on the device.
pub(crate) struct Tiles {
    list: Tensor,
    /// How many there are, and a counter for the blocks of the one launch that takes them, int32 `[2]`.
    count: Tensor,
    /// At least as many as there are: the number itself is known to the device only.
    bound: i64,
    n_rows: i64,
    /// Whether they are of [`GROUP_TILE`] rows, for warpgroups.
    is_tall: bool,
}

/// The left operand of a product: rows of `[.., A]`, found by their sources or in the order of the experts.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) x: &'a Tensor,
    /// int32 `[M]`.
    pub(crate) sources: Option<&'a Tensor>,
}

impl<'a> Rows<'a> {
    pub(crate) fn sorted(x: &'a Tensor) -> Self {
        Self { x, sources: None }
    }

    pub(crate) fn of(x: &'a Tensor, sources: &'a Tensor) -> Self {
        Self {
            x,
            sources: Some(sources),
        }
    }
}

/// The order of selections and its inverse, int64 `[M]`, and the gates, fp32 of `M` elements by selection.
#[derive(Clone, Copy)]
pub(crate) struct Selections<'a> {
    pub(crate) order: &'a Tensor,
    pub(crate) gates: &'a Tensor,
}

/// What [`Ops::down_backward`] finds.
pub(crate) struct DownBackward {
    /// `[M, S]`.
    pub(crate) hidden_grads: Tensor,
    /// `[M, S]`.
    pub(crate) weighted: Tensor,
    /// fp32 `[M]`, by selection.
    pub(crate) gate_grads: Tensor,
}

/// The kernels on one device, in one element type.
#[derive(Clone)]
pub(crate) struct Ops {
    pub(crate) module: Arc<Module>,
    pub(crate) device: Device,
    pub(crate) kind: Kind,
}

/// As `TileList` in the source of the kernels.
#[repr(C)]
struct RawTileList {
    ends: *const c_void,
    sources: *const c_void,
    tiles: *mut c_void,
    n_tiles: *mut c_void,
    n_experts: i32,
    window: i32,
    n_rows: i32,
    is_cut: i32,
}

/// As `RowsProduct` in the source of the kernels.
#[repr(C)]
struct RawRowsProduct {
    x: *const c_void,
    sources: *const c_void,
    weight: *const c_void,
    y: *mut c_void,
    tiles: *const c_void,
    n_tiles: *const c_void,
    d_in: i32,
    d_out: i32,
    activation: i32,
    bias: *const c_void,
    hidden: *mut c_void,
    gates: *const c_void,
    order: *const c_void,
    gate_grads: *mut c_void,
    weighted: *mut c_void,
    targets: *const c_void,
    n_rows: i64,
}

/// As `OuterProduct` in the source of the kernels.
#[repr(C)]
struct RawOuterProduct {
    left: *const c_void,
    left_sources: *const c_void,
    right: *const c_void,
    right_sources: *const c_void,
    ends: *const c_void,
    y: *mut c_void,
    d_left: i32,
    d_right: i32,
    is_wide: i32,
    n_experts: i32,
    n_splits: i32,
    ranked: *mut c_void,
}

/// As `Pieces` in the source of the kernels.
#[repr(C)]
struct RawPieces {
    rows: *mut c_void,
    by_source: *mut c_void,
    inverse: *const c_void,
    sources: *const c_void,
    order: *const c_void,
    gates: *const c_void,
    gate_grads: *mut c_void,
    x: *const c_void,
    n_rows: i64,
    width: i32,
    n_summed: i32,
}

impl Ops {
    /// The tiles of the runs that end at `ends`, int32 `[E]`, for one launch: tall ones where there are warpgroups.
    pub(crate) fn tiles(&self, ends: &Tensor, n_rows: i64, order: Order<'_>) -> Result<Tiles> {
        let is_tall = self.module.has_groups();
        let height = if is_tall { GROUP_TILE } else { TILE };
        let n_experts = ends.size1()?;
        let (sources, n_windows, window, is_cut) = match order {
            Order::Experts => (ptr::null(), 1, i64::from(i32::MAX), false),
            Order::Windows {
                sources,
                n_sources,
                window,
                is_cut,
            } => {
                let n_windows = tiles(n_sources, window).max(1);
                (pointer(sources), n_windows, window, is_cut)
            }
        };
        // The last tile of an expert, and of a window of one, may not be full.
        let n_ends = n_experts * if is_cut { n_windows } else { 1 };
        let bound = n_rows / height + n_ends.min(n_rows);
        let of_all = Tiles {
            list: self.empty(&[bound, 4], Kind::Int)?,
            count: Tensor::f_zeros([2], (Kind::Int, self.device))?,
            bound,
            n_rows,
            is_tall,
        };
        let raw = RawTileList {
            ends: pointer(ends),
            sources,
            tiles: of_all.list.data_ptr(),
            n_tiles: of_all.count.data_ptr(),
            n_experts: narrow(n_experts)?,
            window: narrow(window)?,
            n_rows: narrow(height)?,
            is_cut: is_cut.into(),
        };
        self.launch(Entry::ListTiles, n_windows, LIST_THREADS, 0, &raw)?;
        Ok(of_all)
    }

    /// `y = x[source] · weight[expert]`: `weight [E, A, B]` → `[M, B]`.
    pub(crate) fn product(&self, rows: Rows, weight: &Tensor, tiles: &Tiles) -> Result<Tensor> {
        let (_, _, d_out) = weight.size3()?;
        let y = self.empty(&[tiles.n_rows, d_out], self.kind)?;
        let raw = raw_product(rows, weight, &y, tiles, d_out)?;
        let entries = [
            Entry::Product,
            Entry::ProductWide,
            Entry::ProductInGroups,
            Entry::ProductWideInGroups,
        ];
        self.launch_product(entries, tiles, &raw)?;
        Ok(y)
    }

    /// `y = x[source] · weight[expert]ᵀ`: `weight [E, B, A]` → `[M, B]`.
    pub(crate) fn product_transposed(
        &self,
        rows: Rows,
        weight: &Tensor,
        tiles: &Tiles,
    ) -> Result<Tensor> {
        let (_, d_out, _) = weight.size3()?;
        let y = self.empty(&[tiles.n_rows, d_out], self.kind)?;
        let raw = raw_product(rows, weight, &y, tiles, d_out)?;
        let entries = [
            Entry::ProductTransposed,
            Entry::ProductWideTransposed,
            Entry::ProductTransposedInGroups,
            Entry::ProductWideTransposedInGroups,
        ];
        self.launch_product(entries, tiles, &raw)?;
        Ok(y)
    }

    /// Whether [`Self::added_product`] serves a product that sums `n_summed` rows each: on GPUs that add 16-bit
    /// numbers in their L2 cache, unless the user wants every sum in one order.
    pub(crate) fn can_add(&self, d_in: i64, d_out: i64, n_summed: i64) -> bool {
        let has_shape = d_in <= TILE && d_out > TILE && n_summed > 1;
        has_shape && self.module.has_groups() && !determinism::is_set()
    }

    /// `y[target] = Σ gate · (x[source] · weight[expert])` over the rows of a target, in no fixed order and with a
    /// rounding for each row; `weight [E, A, B]`, or `[E, B, A]` if it `is_transposed`, `targets` int32 `[M]` below
    /// `n_targets` → `[n_targets, B]`. Only where [`Self::can_add`] says so.
    pub(crate) fn added_product(
        &self,
        rows: Rows,
        (weight, is_transposed): (&Tensor, bool),
        ends: &Tensor,
        (targets, n_targets): (&Tensor, i64),
        selections: Option<Selections>,
    ) -> Result<Tensor> {
        let n_rows = targets.size1()?;
        let d_out = weight.size()[if is_transposed { 1 } else { 2 }];
        let order = Order::adding(targets, n_targets, d_out);
        let tiles = self.tiles(ends, n_rows, order)?;
        let y = Tensor::f_zeros([n_targets, d_out], (self.kind, self.device))?;
        let raw = RawRowsProduct {
            targets: pointer(targets),
            gates: selections.map_or(ptr::null(), |selections| pointer(selections.gates)),
            order: selections.map_or(ptr::null(), |selections| pointer(selections.order)),
            ..raw_product(rows, weight, &y, &tiles, d_out)?
        };
        let entry = if is_transposed {
            Entry::AddedProductTransposed
        } else {
            Entry::AddedProduct
        };
        self.launch_crew(entry, tiles.bound, WIDE_SHARED_BYTES, &raw)?;
        Ok(y)
    }

    /// `act(x[source] · weight[expert] (+ bias[expert]))` and what the backward pass needs of it: the result itself for
    /// `ReLU`, the argument of the activation for GELU; `weight [E, A, B]`, `bias [E, B]`.
    pub(crate) fn up(
        &self,
        rows: Rows,
        weight: &Tensor,
        bias: Option<&Tensor>,
        activation: Activation,
        tiles: &Tiles,
    ) -> Result<(Tensor, Tensor)> {
        let (_, _, d_out) = weight.size3()?;
        let y = self.empty(&[tiles.n_rows, d_out], self.kind)?;
        let hidden = match activation {
            Activation::Gelu => Some(y.f_empty_like()?),
            Activation::Relu | Activation::Unknown => None,
        };
        let raw = RawRowsProduct {
            activation: activation_code(activation)?,
            bias: optional(bias),
            hidden: optional(hidden.as_ref()),
            ..raw_product(rows, weight, &y, tiles, d_out)?
        };
        self.launch_tiles((Entry::Up, Entry::UpInGroups), tiles, d_out, &raw)?;
        let kept = hidden.unwrap_or_else(|| y.shallow_clone());
        Ok((y, kept))
    }

    /// From the gradient of the layer's result to that of the argument of the activation; `weight [E, S, A]`, `kept [M,
    /// S]` as [`Self::up`] returned it.
    ///
    /// ```text
    /// u = x[source] · weight[expert]ᵀ
    /// hidden_grads = gate · u · act'(h)     weighted = gate · act(h)     gate_grads = Σ_s act(h) · u
    /// ```
    pub(crate) fn down_backward(
        &self,
        rows: Rows,
        weight: &Tensor,
        kept: &Tensor,
        selections: Selections,
        activation: Activation,
        tiles: &Tiles,
    ) -> Result<DownBackward> {
        let (_, d_out, _) = weight.size3()?;
        let hidden_grads = kept.f_empty_like()?;
        let weighted = kept.f_empty_like()?;
        let n_parts = (d_out + TILE - 1) / TILE;
        let parts = self.empty(&[n_parts, tiles.n_rows], Kind::Float)?;
        let raw = RawRowsProduct {
            activation: activation_code(activation)?,
            hidden: kept.data_ptr(),
            gates: pointer(selections.gates),
            order: pointer(selections.order),
            gate_grads: parts.data_ptr(),
            weighted: weighted.data_ptr(),
            ..raw_product(rows, weight, &hidden_grads, tiles, d_out)?
        };
        let entries = (Entry::DownBackward, Entry::DownBackwardInGroups);
        self.launch_tiles(entries, tiles, d_out, &raw)?;
        let gate_grads = match n_parts {
            1 => parts.f_select(0, 0)?,
            _ => parts.f_sum_dim_intlist(0, false, Kind::Float)?,
        };
        Ok(DownBackward {
            hidden_grads,
            weighted,
            gate_grads,
        })
    }

    /// `Σ left[source]ᵀ · right[source]` over the rows of each expert, `[E, A, B]`, summed in fp32; it stays in fp32 if
    /// `kind` is, and is rounded once otherwise.
    pub(crate) fn outer_product(
        &self,
        left: Rows,
        right: Rows,
        ends: &Tensor,
        kind: Kind,
    ) -> Result<Tensor> {
        let (n_experts, d_left, d_right) = (ends.size1()?, left.x.size()[1], right.x.size()[1]);
        // Warpgroups make tiles of twice the size, in the direction of the longer side.
        let (entry, down, across) = match (self.module.has_groups(), d_left < d_right) {
            (false, _) => (Entry::OuterProduct, TILE, TILE),
            (true, false) => (Entry::OuterProductTall, GROUP_TILE, TILE),
            (true, true) => (Entry::OuterProductBroad, TILE, GROUP_TILE),
        };
        let n_tiles = n_experts * tiles(d_left, down) * tiles(d_right, across);
        let is_in_groups = self.module.has_groups();
        let n_slots = if is_in_groups { N_SLOTS / 2 } else { N_SLOTS };
        let n_splits = splits(n_tiles, n_slots);
        let is_wide = kind == Kind::Float || n_splits > 1;
        let y_kind = if is_wide { Kind::Float } else { self.kind };
        let y = self.empty(&[n_splits, n_experts, d_left, d_right], y_kind)?;
        // And a counter.
        let ranked = self.empty(&[n_experts + 1], Kind::Int)?;
        let raw = RawOuterProduct {
            left: pointer(left.x),
            left_sources: optional(left.sources),
            right: pointer(right.x),
            right_sources: optional(right.sources),
            ends: pointer(ends),
            y: y.data_ptr(),
            d_left: narrow(d_left)?,
            d_right: narrow(d_right)?,
            is_wide: i32::from(is_wide),
            n_experts: narrow(n_experts)?,
            n_splits: narrow(n_splits)?,
            ranked: ranked.data_ptr(),
        };
        let bytes_of_counts = narrow(n_experts * 4)?.cast_unsigned();
        let n_rankers = blocks(n_experts);
        self.launch(
            Entry::RankExperts,
            n_rankers,
            THREADS,
            bytes_of_counts,
            &raw,
        )?;
        if is_in_groups {
            self.launch_crew(entry, n_tiles * n_splits, GROUP_SHARED_BYTES, &raw)?;
        } else {
            let n_blocks = n_tiles * n_splits;
            self.launch(entry, n_blocks, TILE_THREADS, TILE_SHARED_BYTES, &raw)?;
        }
        if n_splits == 1 {
            return Ok(y.f_squeeze_dim(0)?);
        }
        let sum = y.f_sum_dim_intlist(0_i64, false, Kind::Float)?;
        let kind = if kind == Kind::Float { kind } else { self.kind };
        Ok(sum.f_to_kind(kind)?)
    }

    /// `Σ_j gates[i, j] · rows[inverse[i, j]]` over `n_summed` selections each: `[M, A]` → `[M / n_summed, A]`.
    pub(crate) fn sum_rows(
        &self,
        rows: &Tensor,
        inverse: &Tensor,
        n_summed: i64,
        gates: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (n_rows, width) = rows.size2()?;
        let y = self.empty(&[n_rows / n_summed, width], self.kind)?;
        let raw = RawPieces {
            inverse: pointer(inverse),
            gates: optional(gates),
            n_summed: narrow(n_summed)?,
            ..raw_pieces(rows, &y)?
        };
        let n_pieces = n_rows / n_summed * (width / PIECE);
        self.launch(Entry::SumRows, blocks(n_pieces), THREADS, 0, &raw)?;
        Ok(y)
    }

    /// [`Self::sum_rows`], and `rows[inverse[i, j]] · x[i]` in fp32 `[M]`, by selection; `x [M / n_summed, A]`, at most
    /// [`MAX_DOTS`] selections each.
    pub(crate) fn sum_and_dot_rows(
        &self,
        rows: &Tensor,
        inverse: &Tensor,
        gates: &Tensor,
        x: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let n_rows = rows.size()[0];
        let n_sums = x.size()[0];
        let y = x.f_empty_like()?;
        let dots = self.empty(&[n_rows], Kind::Float)?;
        let raw = RawPieces {
            inverse: pointer(inverse),
            gates: pointer(gates),
            gate_grads: dots.data_ptr(),
            x: pointer(x),
            n_summed: narrow(n_rows / n_sums.max(1))?,
            ..raw_pieces(rows, &y)?
        };
        self.launch(
            Entry::SumAndDotRows,
            blocks(n_sums * WARP),
            THREADS,
            0,
            &raw,
        )?;
        Ok((y, dots))
    }

    /// `gate of r · x[source of r]`: `[M, A]`.
    pub(crate) fn weigh_rows(
        &self,
        x: &Tensor,
        sources: &Tensor,
        selections: Selections,
    ) -> Result<Tensor> {
        let (n_rows, width) = (sources.size1()?, x.size()[1]);
        let rows = self.empty(&[n_rows, width], self.kind)?;
        let raw = RawPieces {
            sources: pointer(sources),
            order: pointer(selections.order),
            gates: pointer(selections.gates),
            ..raw_pieces(&rows, x)?
        };
        let n_pieces = n_rows * (width / PIECE);
        self.launch(Entry::WeighRows, blocks(n_pieces), THREADS, 0, &raw)?;
        Ok(rows)
    }

    /// `rows[r] · x[source of r]`, fp32 `[M]` by selection.
    pub(crate) fn dot_rows(
        &self,
        rows: &Tensor,
        x: &Tensor,
        sources: &Tensor,
        order: &Tensor,
    ) -> Result<Tensor> {
        let n_rows = rows.size()[0];
        let dots = self.empty(&[n_rows], Kind::Float)?;
        let raw = RawPieces {
            sources: pointer(sources),
            order: pointer(order),
            gate_grads: dots.data_ptr(),
            ..raw_pieces(rows, x)?
        };
        self.launch(Entry::DotRows, blocks(n_rows * WARP), THREADS, 0, &raw)?;
        Ok(dots)
    }

    /// `x` as the kernels read it: contiguous, aligned, its last axis padded.
    pub(crate) fn operand(&self, x: &Tensor) -> Result<Tensor> {
        aligned(&padded_rows(&x.f_to_kind(self.kind)?)?)
    }

    pub(crate) fn empty(&self, shape: &[i64], kind: Kind) -> Result<Tensor> {
        Ok(Tensor::f_empty(shape, (kind, self.device))?)
    }

    /// By the tile, or by all tiles of the same rows where a short contraction lets them share the rows.
    fn launch_product(
        &self,
        [narrow, wide, in_groups, wide_in_groups]: [Entry; 4],
        tiles: &Tiles,
        raw: &RawRowsProduct,
    ) -> Result<()> {
        let is_wide = i64::from(raw.d_in) <= TILE && i64::from(raw.d_out) > TILE;
        match (is_wide, tiles.is_tall) {
            (false, _) => self.launch_tiles((narrow, in_groups), tiles, raw.d_out.into(), raw),
            (true, false) => self.launch(wide, tiles.bound, TILE_THREADS, TILE_SHARED_BYTES, raw),
            (true, true) => self.launch_crew(wide_in_groups, tiles.bound, WIDE_SHARED_BYTES, raw),
        }
    }

    fn launch_tiles(
        &self,
        (entry, in_groups): (Entry, Entry),
        tiles: &Tiles,
        d_out: i64,
        raw: &RawRowsProduct,
    ) -> Result<()> {
        let n_blocks = tiles.bound * tiles_across(d_out);
        if tiles.is_tall {
            self.launch_crew(in_groups, n_blocks, GROUP_SHARED_BYTES, raw)
        } else {
            self.launch(entry, n_blocks, TILE_THREADS, TILE_SHARED_BYTES, raw)
        }
    }

    /// As many blocks as run at the same time, for at most `n_tiles`, which they take one by one.
    fn launch_crew<P>(&self, entry: Entry, n_tiles: i64, shared_bytes: u32, raw: &P) -> Result<()> {
        let n_blocks = n_tiles.min(self.module.n_multiprocessors);
        self.launch(entry, n_blocks, CREW_THREADS, shared_bytes, raw)
    }

    /// Queues `entry` with its parameters, unless it has no blocks.
    pub(crate) fn launch<P>(
        &self,
        entry: Entry,
        n_blocks: i64,
        n_threads: u32,
        shared_bytes: u32,
        raw: &P,
    ) -> Result<()> {
        if n_blocks == 0 {
            return Ok(());
        }
        let stream = cuda::current_stream(self.device)?;
        let shape = LaunchShape {
            n_blocks: i32::try_from(n_blocks)
                .map_err(|_| format!("{n_blocks} blocks are more than a launch can have"))?
                .cast_unsigned(),
            n_threads,
            shared_bytes,
        };
        let Module {
            driver, context, ..
        } = &*self.module;
        let function = self.module.function(entry);
        // SAFETY: each caller passes the structure of its kernel, with pointers to contiguous tensors of this device
        // and of the shapes that the kernel takes from its numbers. libtorch's allocator gives their memory out again
        // only for work that follows on the same stream.
        unsafe { driver.launch(*context, function, shape, stream, raw) }
            .map_err(|error| format!("cannot launch {entry:?}: {error}").into())
    }
}

/// `x` contiguous and at an aligned address.
pub(crate) fn aligned(x: &Tensor) -> Result<Tensor> {
    let x = x.f_contiguous()?;
    if (x.data_ptr() as usize).is_multiple_of(ALIGNMENT_BYTES as usize) {
        Ok(x)
    } else {
        Ok(x.copy())
    }
}

/// int32 `order / n`: the source of each row, `n` of which share one.
pub(crate) fn sources(order: &Tensor, n: i64) -> Result<Tensor> {
    let divided = match n {
        1 => order.shallow_clone(),
        _ => order.f_divide_scalar_mode(n, "floor")?,
    };
    Ok(divided.f_to_kind(Kind::Int)?)
}

fn raw_product(
    rows: Rows,
    weight: &Tensor,
    y: &Tensor,
    tiles: &Tiles,
    d_out: i64,
) -> Result<RawRowsProduct> {
    Ok(RawRowsProduct {
        x: pointer(rows.x),
        sources: optional(rows.sources),
        weight: pointer(weight),
        y: y.data_ptr(),
        tiles: pointer(&tiles.list),
        n_tiles: pointer(&tiles.count),
        d_in: narrow(rows.x.size()[1])?,
        d_out: narrow(d_out)?,
        activation: 0,
        bias: ptr::null(),
        hidden: ptr::null_mut(),
        gates: ptr::null(),
        order: ptr::null(),
        gate_grads: ptr::null_mut(),
        weighted: ptr::null_mut(),
        targets: ptr::null(),
        n_rows: tiles.n_rows,
    })
}

fn raw_pieces(rows: &Tensor, by_source: &Tensor) -> Result<RawPieces> {
    let (n_rows, width) = rows.size2()?;
    Ok(RawPieces {
        rows: rows.data_ptr(),
        by_source: by_source.data_ptr(),
        inverse: ptr::null(),
        sources: ptr::null(),
        order: ptr::null(),
        gates: ptr::null(),
        gate_grads: ptr::null_mut(),
        x: ptr::null(),
        n_rows,
        width: narrow(width)?,
        n_summed: 1,
    })
}

fn activation_code(activation: Activation) -> Result<i32> {
    match activation {
        Activation::Relu => Ok(1),
        Activation::Gelu => Ok(2),
        Activation::Unknown => Err("an activation of a newer interface".into()),
    }
}

/// Into how many parts the rows of an expert are split where there are too few tiles for the GPU: as many as make the
/// last of its rounds of `n_slots` blocks least empty.
fn splits(n_tiles: i64, n_slots: i64) -> i64 {
    const MAX_SPLITS: i64 = 4;
    if n_tiles == 0 || n_tiles > MAX_SPLITS * n_slots {
        return 1;
    }
    let rounds = |n_splits: i64| (n_tiles * n_splits + n_slots - 1) / n_slots;
    let is_shorter = |a: i64, b: i64| rounds(a) * b < rounds(b) * a;
    (1..=MAX_SPLITS).fold(1, |best, n_splits| {
        if is_shorter(n_splits, best) {
            n_splits
        } else {
            best
        }
    })
}

fn tiles_across(width: i64) -> i64 {
    tiles(width, TILE)
}

fn tiles(width: i64, of_tile: i64) -> i64 {
    (width + of_tile - 1) / of_tile
}

pub(crate) fn blocks(n_threads: i64) -> i64 {
    let per_block = i64::from(THREADS);
    (n_threads + per_block - 1) / per_block
}

pub(crate) fn narrow(size: i64) -> Result<i32> {
    i32::try_from(size).map_err(|_| format!("a size of {size} is more than 2³¹").into())
}

pub(crate) fn pointer(tensor: &Tensor) -> *const c_void {
    tensor.data_ptr().cast_const()
}

pub(crate) fn optional(tensor: Option<&Tensor>) -> *mut c_void {
    tensor.map_or(ptr::null_mut(), Tensor::data_ptr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_split_where_the_last_round_would_be_almost_empty() {
        // SwitchHead's values: 40 experts of 1024 × 128, 2 rounds as they are and 5 of a quarter each when split.
        assert_eq!(splits(320, 264), 4);
        assert_eq!(splits(264, 264), 1);
        assert_eq!(splits(66, 264), 4);
        assert_eq!(splits(387 * 8, 264), 1);
        assert_eq!(splits(0, 264), 1);
    }
}
