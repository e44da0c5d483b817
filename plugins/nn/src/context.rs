//! What all layers of one forward pass share: the kernel, precision, and whether the pass trains or reports.

use crate::padding::{self, padded};
use crate::router::{self, RouterDtype};
use crate::{LayerNorm, Linear, Routing, Stream};
use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::{
    Activation, FusedCall, MoeMlp, MoeMlpOptions, ResidualNorm, ResidualNormOptions, Rotate,
    Select, SelectOptions,
};
use moeut_plugin_api::{DType, Device, GroupedMatmul, Host, PluginError, TensorHandle, Wishes};
use moeut_torch::frugal::give_away;
use moeut_torch::{
    Autocast, FunctionError, IntoHandle, IntoTensor, OrPluginError, dtype, relu_linear,
};
use std::rc::Rc;
use tch::{Kind, Tensor};

/// Facts about one forward pass.
#[derive(Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Context {
    /// The grouped matrix product, if the model has experts, and calls that fuse what is around products.
    pub kernel: Option<Rc<KernelClient>>,
    /// Element type of the grouped product's operands.
    pub compute: Kind,
    /// Whether autocast is on around the pass.
    pub is_mixed: bool,
    /// In which type routers compute.
    pub router_dtype: RouterDtype,
    /// Dropout and regularizers are on.
    pub is_training: bool,
    /// What the pass should tell about itself.
    pub wishes: Wishes,
    /// All processes that train, if there are several.
    pub everyone: Option<Host>,
    /// Statistics have the reference's definitions where those are wrong.
    pub is_compat: bool,
    /// What costs little to make is made again in the backward pass instead of being kept for it.
    pub is_frugal: bool,
}

/// The residual stream where a layer reads it; all three are `[B, T, D]`, or as wide as [`Context::aligned`] makes it.
#[derive(Debug)]
pub struct Reading {
    /// The stream itself.
    pub stream: Tensor,
    /// What values and experts see.
    pub plain: Tensor,
    /// What queries, keys and routers see.
    pub normed: Tensor,
}

impl Reading {
    /// For a layer all of whose parts see the same.
    pub fn plain(x_btd: &Tensor) -> Self {
        let [stream, plain, normed] = [0; 3].map(|_| x_btd.shallow_clone());
        Self {
            stream,
            plain,
            normed,
        }
    }
}

/// What a kernel selects for a layer.
#[derive(Debug)]
pub struct Choice {
    /// `[N·G, k]`.
    pub gate: Tensor,
    /// Logarithms of mean probabilities, `[B, G, E]`.
    pub log_means: Tensor,
    /// Experts through all groups, int32 `[N·G, k]`.
    pub ids: Tensor,
    /// The selections.
    pub routing: Routing,
}

impl Context {
    /// The width in which a pass computes `width` channels, the rest of which are zero: the next one that products
    /// like, if the pass is in mixed precision.
    pub fn aligned(&self, width: i64) -> i64 {
        if self.is_mixed {
            padding::aligned(width)
        } else {
            width
        }
    }

    /// A weight for products in the compute type, its last axes as long as `last`, the rest zeros.
    pub fn operand_of(&self, weight: &Tensor, last: &[i64]) -> Tensor {
        padded(&weight.to_kind(self.compute), last)
    }

    /// `relu(layer(x))`, with zeros up to `width` outputs.
    ///
    /// # Errors
    /// If memory does not suffice.
    pub fn relu_linear(
        &self,
        x: &Tensor,
        layer: &Linear,
        width: i64,
    ) -> Result<Tensor, PluginError> {
        let d_in = x.size().last().copied().unwrap_or(0);
        let is_aligned = [d_in, width].iter().all(|width| width % 8 == 0);
        if !is_aligned || !relu_linear::is_worthwhile(x.device(), self.compute) {
            return Ok(layer.forward_to(x, width).relu());
        }
        let (weight, bias) = layer.operands(self.compute, [width, d_in]);
        let y = relu_linear::relu_linear(&x.to_kind(self.compute), &weight, &bias);
        y.or_plugin_error("a linear layer cannot be computed")
    }

    /// Adds to the stream what is still to be added, and reads it through `norm`, if there is one: in one call
    /// of the kernel, [`moeut_plugin_api::Kernel::residual_norm`], which rounds `plain` to the compute type, or as a
    /// composition that rounds nothing. With `is_wide`, `normed` is as precise as the stream.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn reading(
        &self,
        stream: &Stream,
        norm: Option<&LayerNorm>,
        is_wide: bool,
    ) -> Result<Reading, PluginError> {
        let (x, update) = stream.parts();
        let affine = norm.and_then(LayerNorm::affine);
        if let (Some((weight, bias)), Some(dtype)) = (affine, dtype(self.compute))
            && let Some(kernel) = self.fused(FusedCall::ResidualNorm, None, x, dtype)
            && x.kind() == at_least_f32(self.compute)
        {
            let options = ResidualNormOptions {
                eps: LayerNorm::EPS,
                dtype,
                is_wide,
            };
            let found = kernel.residual_norm(ResidualNorm {
                x: x.share(),
                update: update.map(|update| self.operand(update)),
                weight: weight.share(),
                bias: bias.share(),
                options,
            })?;
            let [stream, plain, normed] =
                [found.sum, found.plain, found.normed].map(IntoTensor::into_tensor);
            let kernel = Rc::clone(kernel);
            // But for the rounding of `plain`, from which the kernel takes the layernorm's own gradient, too.
            self.give_away(&normed, [&plain, weight, bias], move |from, _| {
                let [x, weight, bias] = from.map(IntoHandle::into_handle);
                let again = kernel.residual_norm(ResidualNorm {
                    x,
                    update: None,
                    weight,
                    bias,
                    options,
                })?;
                Ok(again.normed.into_tensor())
            })?;
            return Ok(Reading {
                stream,
                plain,
                normed,
            });
        }
        let x = stream.whole();
        let normed = match norm.map(LayerNorm::share) {
            Some(norm) => self.cheap([x], move |[x], _| Ok(norm.forward(x)))?,
            None => x.shallow_clone(),
        };
        Ok(Reading {
            stream: x.shallow_clone(),
            plain: x.shallow_clone(),
            normed,
        })
    }

    /// Makes a tensor from others, with an operation that is cheap enough to be repeated: in a frugal pass the backward
    /// pass does, with the same result, instead of finding the tensor kept. `make` must hold nothing with a history in the
    /// graph, and draw no random numbers.
    ///
    /// # Errors
    /// What `make` says, or if libtorch has no memory.
    pub fn cheap<const N: usize>(
        &self,
        from: [&Tensor; N],
        make: impl Fn([&Tensor; N], &Self) -> Result<Tensor, PluginError> + 'static,
    ) -> Result<Tensor, PluginError> {
        let tensor = make(from, self)?;
        self.give_away(&tensor, from, move |from, ctx| make(from.each_ref(), ctx))?;
        Ok(tensor)
    }

    /// In a frugal pass, lets the backward pass make `tensor` from others.
    fn give_away<const N: usize>(
        &self,
        tensor: &Tensor,
        from: [&Tensor; N],
        again: impl Fn([Tensor; N], &Self) -> Result<Tensor, PluginError> + 'static,
    ) -> Result<(), PluginError> {
        if !self.is_frugal {
            return Ok(());
        }
        let (ctx, device) = (self.clone(), tensor.device());
        let again = move |from| {
            let _mixed = Autocast::new(device, ctx.is_mixed.then_some(ctx.compute))?;
            again(from, &ctx).map_err(|error| FunctionError::from(error.to_string()))
        };
        give_away(tensor, from, again)
            .or_plugin_error("a tensor cannot be prepared to be made again")
    }

    /// Selects experts by sigmoid gates from `x [B, T, D]` with `weight [G·E, D]`, in one call of the kernel,
    /// [`moeut_plugin_api::Kernel::select`]; nothing if the kernel has no such call for this, or if the routers' scores
    /// are rounded as the reference's.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn select(
        &self,
        x: &Tensor,
        weight: &Tensor,
        n_groups: i64,
        top_k: i64,
    ) -> Result<Option<Choice>, PluginError> {
        let (size, n_ids) = (x.size(), weight.size()[0]);
        let kind = self.router_operands(weight);
        let Some(dtype) = dtype(kind) else {
            return Ok(None);
        };
        let fits = n_ids <= Select::MAX_IDS
            && n_ids / n_groups <= Select::MAX_EXPERTS
            && top_k <= Select::MAX_SELECTED
            && x.numel() > 0;
        if !fits || self.is_router_rounded() {
            return Ok(None);
        }
        let Some(kernel) = self.fused(FusedCall::Select, None, x, dtype) else {
            return Ok(None);
        };
        let selected = kernel.select(Select {
            x: x.reshape([-1, size[2]]).to_kind(kind).into_handle(),
            weight: padded(weight, &size[2..]).into_handle(),
            options: SelectOptions {
                n_groups,
                top_k,
                n_sequences: size[0],
                allows_tf32: self.router_dtype == RouterDtype::Tf32,
                keeps_less: self.is_frugal,
            },
        })?;
        Ok(Some(Choice {
            gate: selected.gate.into_tensor(),
            log_means: selected.log_means.into_tensor(),
            ids: selected.ids.into_tensor(),
            routing: Routing::of_kernel(selected.selection),
        }))
    }

    /// Rotates `x [B, T, H, d]` by angles whose cosines and sines are `[T, n]`, in one call of the kernel,
    /// [`moeut_plugin_api::Kernel::rotate`]; nothing if the kernel has no such call.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn rotate(
        &self,
        x: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
    ) -> Result<Option<Tensor>, PluginError> {
        let Some(dtype) = dtype(x.kind()) else {
            return Ok(None);
        };
        let Some(kernel) = self.fused(FusedCall::Rotate, None, x, dtype) else {
            return Ok(None);
        };
        let y = kernel.rotate(Rotate {
            x: x.share(),
            cos: cos.share(),
            sin: sin.share(),
        })?;
        Ok(Some(y.into_tensor()))
    }

    /// Whether routers want their input to be as precise as the residual stream.
    pub fn has_wide_routers(&self) -> bool {
        self.is_mixed && matches!(self.router_dtype, RouterDtype::F32 | RouterDtype::Tf32)
    }

    /// The type of the operands of routers.
    fn router_operands(&self, weight: &Tensor) -> Kind {
        match self.router_dtype {
            RouterDtype::Mixed if self.is_mixed => self.compute,
            _ => at_least_f32(weight.kind()),
        }
    }

    /// The kernel, if it has `call` for tensors like `x` in `dtype`.
    fn fused(
        &self,
        call: FusedCall,
        activation: Option<Activation>,
        x: &Tensor,
        dtype: DType,
    ) -> Option<&Rc<KernelClient>> {
        let device = match x.device() {
            tch::Device::Cuda(index) => Device::Cuda(u32::try_from(index).unwrap_or(u32::MAX)),
            _ => Device::Cpu,
        };
        let kernel = self.kernel.as_ref()?;
        kernel
            .provides(call, activation, device, dtype)
            .then_some(kernel)
    }

    fn operand(&self, x: &Tensor) -> TensorHandle {
        x.to_kind(self.compute).into_handle()
    }

    /// Gates that a kernel made stay as precise as it made them.
    fn gate(&self, gate: &Tensor, routing: &Routing) -> TensorHandle {
        if routing.is_of_kernel() {
            gate.share()
        } else {
            self.operand(gate)
        }
    }

    /// The grouped product `[R, K] × [E, K, N]` of [`moeut_plugin_api::Kernel`], in the compute type.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn grouped_matmul(
        &self,
        x: &Tensor,
        weight: &Tensor,
        routing: &Routing,
        gate: Option<&Tensor>,
    ) -> Result<Tensor, PluginError> {
        let Some(kernel) = &self.kernel else {
            return Err(PluginError::new("experts without a grouped matrix product")
                .why("the model was built without a kernel")
                .fix("report this to the authors of the model's plugin"));
        };
        let product = kernel.grouped_matmul(GroupedMatmul {
            x: self.operand(x),
            weight: self.operand(weight),
            selection: routing.selection(),
            gate: gate.map(|gate| self.gate(gate, routing)),
        })?;
        Ok(product.into_tensor())
    }

    /// A whole σ-MoE layer after its routing, [`moeut_plugin_api::Kernel::moe_mlp`], in the compute type; nothing if
    /// the kernel has no such call.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn moe_mlp(
        &self,
        activation: Activation,
        x: &Tensor,
        [w1, w2]: [&Tensor; 2],
        b1: Option<&Tensor>,
        gate: &Tensor,
        routing: &Routing,
    ) -> Result<Option<Tensor>, PluginError> {
        let kernel = dtype(self.compute)
            .and_then(|dtype| self.fused(FusedCall::MoeMlp, Some(activation), x, dtype));
        let Some(kernel) = kernel else {
            return Ok(None);
        };
        let y = kernel.moe_mlp(MoeMlp {
            x: self.operand(x),
            w1: self.operand(w1),
            b1: b1.map(|b1| self.operand(b1)),
            w2: self.operand(w2),
            gate: self.gate(gate, routing),
            selection: routing.selection(),
            options: MoeMlpOptions {
                activation,
                keeps_less: self.is_frugal,
            },
        })?;
        Ok(Some(y.into_tensor()))
    }

    /// Dropout with probability `p` while training.
    pub fn dropout(&self, x: Tensor, p: f64) -> Tensor {
        if p > 0.0 && self.is_training {
            x.dropout(p, true)
        } else {
            x
        }
    }

    /// Router logits `x · weightᵀ + bias`, `[.., D] → [.., rows]`, in the type that [`RouterDtype`] says.
    ///
    /// # Errors
    /// If autocast cannot be suspended, or libtorch has no memory.
    pub fn router_logits(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor, PluginError> {
        let mixed = self.is_mixed.then_some(self.compute);
        let width = &x.size()[x.dim() - 1..];
        router::logits(x, &padded(weight, width), bias, self.router_dtype, mixed)
            .or_plugin_error("cannot compute router logits")
    }

    /// Suspends autocast while it lives: for statistics, whose rounding would show.
    ///
    /// # Errors
    /// If the device has no autocast.
    pub fn full_precision(&self, device: tch::Device) -> Result<Option<Autocast>, PluginError> {
        self.is_mixed
            .then(|| Autocast::new(device, None))
            .transpose()
            .or_plugin_error("mixed precision cannot be suspended")
    }

    /// Whether routers compute in autocast's type, with its rounding of scores.
    pub fn is_router_rounded(&self) -> bool {
        self.router_dtype == RouterDtype::Amp
    }
}

/// `F32` for half types, else the type itself.
pub(crate) fn at_least_f32(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        wide => wide,
    }
}
