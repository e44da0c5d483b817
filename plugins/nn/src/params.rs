//! The parameters of a model under the reference's dotted names, in the order in which layers are built.
//!
//! Not `tch::nn::VarStore`: that one is for a single element type, sorts names and cannot hold integer buffers.

use crate::Init;
use moeut_plugin_api::Parameter;
use moeut_torch::IntoHandle;
use std::cell::RefCell;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// A place in the tree of names where a layer puts its tensors. Clones share the tree.
#[derive(Debug, Clone)]
pub struct Params {
    entries: Rc<RefCell<Vec<Entry>>>,
    prefix: String,
    kind: Kind,
    device: Device,
    style: InitStyle,
}

/// How parameters start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitStyle {
    /// As each layer says.
    Own,
    /// As Transformer-XL: `N(0, 0.02)`; see [`Init::transformer_xl`].
    TransformerXl,
    /// Not at all: each tensor is one zero seen through a shape, which takes neither time nor memory. For counting.
    ShapeOnly,
}

#[derive(Debug)]
struct Entry {
    name: String,
    tensor: Tensor,
    is_trainable: bool,
}

impl Params {
    /// An empty tree for parameters of this element type.
    pub fn new(kind: Kind, device: Device) -> Self {
        Self {
            entries: Rc::default(),
            prefix: String::new(),
            kind,
            device,
            style: InitStyle::Own,
        }
    }

    /// The same tree with other initial values.
    #[must_use]
    pub fn with_style(mut self, style: InitStyle) -> Self {
        self.style = style;
        self
    }

    /// The subtree `name`.
    #[must_use]
    pub fn sub(&self, name: &str) -> Self {
        let mut sub = self.clone();
        sub.prefix = format!("{}{name}.", self.prefix);
        sub
    }

    /// Adds a tensor that the optimizer trains.
    pub fn parameter(&self, name: &str, shape: &[i64], init: Init) -> Tensor {
        match self.style {
            InitStyle::Own => self.trained(name, init, shape),
            InitStyle::TransformerXl => self.trained(name, init.transformer_xl(), shape),
            InitStyle::ShapeOnly => self.add(name, shape_only(shape, self.options()), true),
        }
    }

    /// Adds a tensor of zeros that is only saved.
    pub fn buffer(&self, name: &str, shape: &[i64], kind: Kind) -> Tensor {
        let options = (kind, self.device);
        let value = match self.style {
            InitStyle::ShapeOnly => shape_only(shape, options),
            InitStyle::Own | InitStyle::TransformerXl => Tensor::zeros(shape, options),
        };
        self.add(name, value, false)
    }

    /// Element type and device of the parameters.
    pub fn options(&self) -> (Kind, Device) {
        (self.kind, self.device)
    }

    /// All tensors of the tree, shared with the layers.
    pub fn parameters(&self) -> Vec<Parameter> {
        let share = |entry: &Entry| Parameter {
            name: entry.name.clone(),
            tensor: entry.tensor.share(),
            is_trainable: entry.is_trainable,
        };
        self.entries.borrow().iter().map(share).collect()
    }

    fn trained(&self, name: &str, init: Init, shape: &[i64]) -> Tensor {
        let value = init.tensor(shape, self.options());
        self.add(name, value.set_requires_grad(true), true)
    }

    fn add(&self, name: &str, tensor: Tensor, is_trainable: bool) -> Tensor {
        let shared = tensor.shallow_clone();
        let name = format!("{}{name}", self.prefix);
        self.entries.borrow_mut().push(Entry {
            name,
            tensor,
            is_trainable,
        });
        shared
    }
}

fn shape_only(shape: &[i64], options: (Kind, Device)) -> Tensor {
    Tensor::zeros([], options).expand(shape, false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use moeut_torch::IntoTensor;

    #[test]
    fn a_billion_parameters_without_storage() {
        let params = Params::new(Kind::Float, Device::Cpu).with_style(InitStyle::ShapeOnly);
        let weight = params.parameter("weight", &[40_000, 40_000], Init::Normal(0.02));
        assert_eq!(weight.numel(), 1_600_000_000);
        assert_eq!(weight.stride(), [0, 0]);
        let all = params.parameters();
        assert_eq!(all[0].tensor.tensor().size(), [40_000, 40_000]);
        assert!(all[0].is_trainable);
    }

    #[test]
    fn names_are_paths_in_the_order_of_building() {
        let params = Params::new(Kind::Float, Device::Cpu);
        let _ = params.sub("b").sub("c").buffer("x", &[], Kind::Int64);
        let _ = params.sub("a").parameter("y", &[2], Init::Ones);
        let names: Vec<String> = params.parameters().into_iter().map(|p| p.name).collect();
        assert_eq!(names, ["b.c.x", "a.y"]);
    }
}
