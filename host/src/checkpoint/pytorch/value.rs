//! What a pickle holds: plain values in one arena, and a view on them.
//!
//! Values refer to each other by index. So a pickle that contains itself leaks nothing, one nested a million deep is
//! freed without recursion, and one that repeats a value does not copy it.

use std::collections::HashSet;

use tch::Kind;

use super::globals::Global;

/// Lists within lists that are followed; a checkpoint has about six.
const MAX_DEPTH: usize = 64;
/// Longest text of an argument, and of a name in a listing.
const MAX_TEXT_BYTES: usize = 4096;

/// Index of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Id(pub(super) u32);

/// One value.
#[derive(Debug)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Box<str>),
    Bytes(Box<[u8]>),
    List(Vec<Id>),
    Tuple(Box<[Id]>),
    Set(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A function or class of the allowed ones, before it is called.
    Global(Global),
    /// The type of a numpy scalar, such as `f8`.
    NumpyType(Box<str>),
    Storage(Box<Storage>),
    Tensor(Box<TensorRef>),
}

impl Node {
    /// For messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(_) => "str",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Set(_) => "set",
            Self::Dict(_) => "dict",
            Self::Global(_) => "class",
            Self::NumpyType(_) => "numpy type",
            Self::Storage(_) => "storage",
            Self::Tensor(_) => "tensor",
        }
    }
}

/// Elements in an entry of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::checkpoint) struct Storage {
    /// Element type.
    pub(in crate::checkpoint) kind: Kind,
    /// The entry is `data/<key>`.
    pub(super) key: String,
    /// Elements.
    pub(super) numel: u64,
}

/// A view on a storage, checked to lie inside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::checkpoint) struct TensorRef {
    pub(in crate::checkpoint) storage: Storage,
    /// Of the first element.
    pub(super) offset: u64,
    pub(in crate::checkpoint) shape: Vec<i64>,
    /// In elements.
    pub(super) stride: Vec<i64>,
    /// One past the last element used, from the offset; 0 without elements.
    pub(super) span: u64,
}

impl TensorRef {
    /// Elements of the tensor itself.
    pub(in crate::checkpoint) fn numel(&self) -> u64 {
        self.shape.iter().map(|&dim| dim.unsigned_abs()).product()
    }
}

/// A pickle that was read.
#[derive(Debug)]
pub(super) struct Pickle {
    pub(super) nodes: Vec<Node>,
    pub(super) root: Id,
}

impl Pickle {
    pub(super) fn root(&self) -> Value<'_> {
        Value {
            pickle: self,
            id: self.root,
        }
    }
}

/// A view on one value.
#[derive(Debug, Clone, Copy)]
pub(in crate::checkpoint) struct Value<'a> {
    pickle: &'a Pickle,
    id: Id,
}

impl<'a> Value<'a> {
    fn node(self) -> &'a Node {
        // Indices are made by the machine for nodes that it has pushed.
        &self.pickle.nodes[self.id.0 as usize]
    }

    fn at(self, id: Id) -> Self {
        Self { id, ..self }
    }

    /// What it is, for messages.
    pub(in crate::checkpoint) fn kind(self) -> &'static str {
        self.node().kind()
    }

    /// The value of a dictionary's key.
    pub(in crate::checkpoint) fn get(self, key: &str) -> Option<Self> {
        self.entries()
            .rev()
            .find(|(name, _)| name.as_str() == Some(key))
            .map(|(_, value)| value)
    }

    /// The keys and values of a dictionary, of anything else none.
    pub(in crate::checkpoint) fn entries(self) -> impl DoubleEndedIterator<Item = (Self, Self)> {
        let entries: &[(Id, Id)] = match self.node() {
            Node::Dict(entries) => entries,
            _ => &[],
        };
        entries
            .iter()
            .map(move |&(key, value)| (self.at(key), self.at(value)))
    }

    pub(in crate::checkpoint) fn is_dict(self) -> bool {
        matches!(self.node(), Node::Dict(_))
    }

    /// The elements of a list or tuple, of anything else none.
    pub(in crate::checkpoint) fn items(self) -> impl ExactSizeIterator<Item = Self> {
        let items: &[Id] = match self.node() {
            Node::List(items) | Node::Set(items) => items,
            Node::Tuple(items) => items,
            _ => &[],
        };
        items.iter().map(move |&id| self.at(id))
    }

    pub(in crate::checkpoint) fn as_str(self) -> Option<&'a str> {
        match self.node() {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(in crate::checkpoint) fn as_u64(self) -> Option<u64> {
        match self.node() {
            Node::Int(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub(in crate::checkpoint) fn as_f64(self) -> Option<f64> {
        match self.node() {
            Node::Int(number) => Some(*number as f64),
            Node::Float(number) => Some(*number),
            _ => None,
        }
    }

    pub(in crate::checkpoint) fn as_tensor(self) -> Option<&'a TensorRef> {
        match self.node() {
            Node::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// As the reference's parser wants it on a command line: `none`, `1` for yes, lists with commas. Nothing for what
    /// no argument can be.
    pub(in crate::checkpoint) fn to_argument(self) -> Option<String> {
        match self.node() {
            Node::None => Some("none".to_owned()),
            Node::Bool(value) => Some(u8::from(*value).to_string()),
            Node::Int(number) => Some(number.to_string()),
            // Rust writes 2.5e-9 as 0.0000000025; both are the same number.
            Node::Float(number) => Some(number.to_string()),
            Node::Text(text) => (text.len() <= MAX_TEXT_BYTES).then(|| text.to_string()),
            Node::List(items) | Node::Set(items) => self.joined(items),
            Node::Tuple(items) => self.joined(items),
            _ => None,
        }
    }

    fn joined(self, items: &[Id]) -> Option<String> {
        let mut joined = String::new();
        for &item in items {
            let item = self.at(item);
            if item.items().len() > 0 || joined.len() > MAX_TEXT_BYTES {
                return None;
            }
            if !joined.is_empty() {
                joined.push(',');
            }
            joined.push_str(&item.to_argument()?);
        }
        Some(joined)
    }

    /// All tensors below this value with their paths, such as `model.embedding.weight`; each value is visited once.
    pub(in crate::checkpoint) fn tensors(self) -> Vec<(String, &'a TensorRef)> {
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        let mut open = vec![(String::new(), self, 0)];
        while let Some((path, value, depth)) = open.pop() {
            if let Some(tensor) = value.as_tensor() {
                found.push((path, tensor));
                continue;
            }
            if depth == MAX_DEPTH || !seen.insert(value.id.0) {
                continue;
            }
            let below = |name: &str| match path.as_str() {
                "" => name.to_owned(),
                path => format!("{path}.{name}"),
            };
            let first = open.len();
            for (key, value) in value.entries() {
                let name = key.to_argument().unwrap_or_else(|| "?".to_owned());
                open.push((below(&name), value, depth + 1));
            }
            for (index, item) in value.items().enumerate() {
                open.push((below(&index.to_string()), item, depth + 1));
            }
            // A stack: the first one is to come out first.
            open[first..].reverse();
        }
        found
    }
}
