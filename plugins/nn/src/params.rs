//! The parameters of a model under the reference's dotted names, in the order in which layers are built.
//!
//! Not `tch::nn::VarStore`: that one is for a single element type, sorts names and cannot hold integer buffers.

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
        }
    }

    /// The subtree `name`.
    #[must_use]
    pub fn sub(&self, name: &str) -> Self {
        let mut sub = self.clone();
        sub.prefix = format!("{}{name}.", self.prefix);
        sub
    }

    /// Adds a tensor that the optimizer trains, with its initial value.
    pub fn trainable(&self, name: &str, init: &Tensor) -> Tensor {
        self.add(name, init.set_requires_grad(true), true)
    }

    /// Adds a tensor that is only saved.
    pub fn buffer(&self, name: &str, value: Tensor) -> Tensor {
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
