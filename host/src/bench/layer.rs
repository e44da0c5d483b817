//! A layer by itself: a differentiable call with its inputs, timed forward, and forward and backward.

use super::ceilings::Ceilings;
use super::options::Effort;
use super::report::{Row, Work};
use super::timer::time;
use crate::train::memory;
use moeut_plugin_api::PluginError;
use moeut_torch::{Context, Function, FunctionError, OrPluginError, apply, cuda};
use tch::{Device, Kind, Tensor};

/// What computes the result from the inputs.
pub(super) type Call<'a> = dyn Fn(&[Tensor]) -> Result<Tensor, PluginError> + 'a;

/// A layer.
pub(super) struct Layer<'a> {
    /// For people.
    pub(super) name: String,
    /// All are differentiable.
    pub(super) inputs: Vec<Tensor>,
    /// The computation.
    pub(super) call: Box<Call<'a>>,
    /// Tokens of a call.
    pub(super) n_tokens: i64,
    /// Floating-point operations of the forward pass; the backward pass counts as two.
    pub(super) flops: f64,
}

impl Layer<'_> {
    /// Times the forward pass, and both.
    ///
    /// # Errors
    /// Whatever the layer says.
    pub(super) fn measure(
        &self,
        device: Device,
        effort: Effort,
        ceilings: &Ceilings,
    ) -> Result<[Row; 2], PluginError> {
        let gradient = self.gradient()?;
        let forward = |n| {
            let call = || (self.call)(&self.inputs).map(drop);
            tch::no_grad(|| (0..n).try_for_each(|_| call()))
        };
        let both = |n| (0..n).try_for_each(|_| self.results(&gradient).map(drop));
        let bytes = |tensors: &[Tensor]| -> f64 {
            let bytes = tensors
                .iter()
                .map(|x| x.numel() * x.kind().elt_size_in_bytes());
            bytes.sum::<usize>() as f64
        };
        let (read, written) = (bytes(&self.inputs), bytes(std::slice::from_ref(&gradient)));
        // The backward pass reads inputs and the gradient of the result, and writes a gradient for each input.
        Ok([
            self.row(
                "forward",
                forward,
                1.0,
                read + written,
                (device, effort, ceilings),
            )?,
            self.row(
                "forward + backward",
                both,
                3.0,
                3.0 * read + 2.0 * written,
                (device, effort, ceilings),
            )?,
        ])
    }

    fn row(
        &self,
        pass: &'static str,
        work: impl FnMut(u64) -> Result<(), PluginError>,
        n_forwards: f64,
        bytes: f64,
        (device, effort, ceilings): (Device, Effort, &Ceilings),
    ) -> Result<Row, PluginError> {
        if device.is_cuda() {
            cuda::reset_peak_memory(device).or_plugin_error("memory cannot be observed")?;
        }
        let seconds = time(device, effort, work)?;
        let work = Work {
            n_tokens: self.n_tokens.unsigned_abs(),
            flops: Some(n_forwards * self.flops),
            bytes: Some(bytes),
        };
        let mut row = Row::new(self.name.clone(), pass, seconds, work, ceilings);
        row.peak_bytes = memory::peak(device);
        Ok(row)
    }

    /// The gradient that the backward pass begins with; the same for all layers of one shape.
    ///
    /// # Errors
    /// Whatever the layer says.
    pub(super) fn gradient(&self) -> Result<Tensor, PluginError> {
        let y = tch::no_grad(|| (self.call)(&self.inputs))?;
        tch::manual_seed(1);
        Ok(y.randn_like())
    }

    /// The result and the gradients of all inputs.
    ///
    /// # Errors
    /// Whatever the layer says.
    pub(super) fn results(&self, gradient: &Tensor) -> Result<Vec<Tensor>, PluginError> {
        let inputs: Vec<Tensor> = self
            .inputs
            .iter()
            .map(|input| input.detach().set_requires_grad(true))
            .collect();
        let y = (self.call)(&inputs)?;
        let loss = apply(Upstream, &[&y, gradient]).or_plugin_error("a layer has no gradient")?;
        for loss in &loss {
            loss.f_backward()
                .or_plugin_error("the backward pass failed")?;
        }
        let gradients = inputs.iter().map(Tensor::grad);
        Ok(std::iter::once(y.detach()).chain(gradients).collect())
    }
}

/// A loss whose gradient is its second input, so that it takes no time.
struct Upstream;

impl Function for Upstream {
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>, FunctionError> {
        let [y, gradient] = inputs else {
            return Err(FunctionError::from("not two inputs".to_owned()));
        };
        ctx.save(&[gradient])?;
        Ok(vec![Tensor::f_zeros([], (Kind::Float, y.device()))?])
    }

    fn backward(
        &self,
        ctx: &Context,
        _: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        Ok(vec![ctx.saved()?.pop(), None])
    }
}

/// The largest of the relative distances (Frobenius norms) of the pairs.
pub(super) fn distance(wanted: &[Tensor], got: &[Tensor]) -> f64 {
    let relative = wanted.iter().zip(got).map(|(wanted, got)| {
        let wanted = wanted.to_kind(Kind::Float);
        ((got.to_kind(Kind::Float) - &wanted).norm() / wanted.norm()).double_value(&[])
    });
    relative.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backward_pass_begins_with_the_given_gradient() {
        let tensor = |values: &[f32]| Tensor::from_slice(values);
        let layer = Layer {
            name: "product".into(),
            inputs: vec![tensor(&[1.0, 2.0]), tensor(&[3.0, 4.0])],
            call: Box::new(|inputs| Ok(&inputs[0] * &inputs[1])),
            n_tokens: 2,
            flops: 2.0,
        };
        let results = layer.results(&tensor(&[10.0, 100.0])).unwrap();
        let wanted = [[3.0, 8.0], [30.0, 400.0], [10.0, 200.0]].map(|values| tensor(&values));
        assert!(distance(&wanted, &results) < 1e-7);
        let gradient = layer.gradient().unwrap();
        assert!(gradient.equal(&layer.gradient().unwrap()));
    }

    #[test]
    fn distances_are_relative_and_the_largest_counts() {
        let pair = |a: f32, b: f32| [Tensor::from_slice(&[3.0, a]), Tensor::from_slice(&[b])];
        let far = distance(&pair(4.0, 1.0), &pair(4.5, 1.0));
        assert!((far - 0.1).abs() < 1e-6, "{far}");
        assert!((distance(&pair(4.0, 2.0), &pair(4.5, 1.0)) - 0.5).abs() < 1e-6);
    }
}
