//! The functions and classes that a pickle may name, and what calling them makes. Nothing else is ever called: a
//! pickle that names `os.system` ends in an error that says so.

use tch::Kind;

use super::value::{Id, Node, Storage, TensorRef};

/// libtorch's own limit is 64.
const MAX_DIMENSIONS: usize = 64;

/// An allowed function or class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    /// A mapping: `OrderedDict`, and the reference's own `DotDict`.
    Mapping,
    /// `defaultdict`; what makes its defaults is of no use here.
    DefaultDict,
    /// `set` or `frozenset`.
    Set,
    List,
    Tuple,
    /// `_codecs.encode`, by which protocol 2 writes bytes.
    Encode,
    RebuildTensor,
    RebuildParameter,
    /// `torch.FloatStorage` and so on.
    StorageOf(Kind),
    /// `torch.float32` and so on.
    DType(Kind),
    /// `torch.Size`.
    Size,
    /// `torch.device`.
    Device,
    NumpyScalar,
    NumpyType,
}

/// PyTorch's names of the element types that checkpoints of ours may have.
const KINDS: [(&str, &str, Kind); 10] = [
    ("BoolStorage", "bool", Kind::Bool),
    ("ByteStorage", "uint8", Kind::Uint8),
    ("CharStorage", "int8", Kind::Int8),
    ("ShortStorage", "int16", Kind::Int16),
    ("IntStorage", "int32", Kind::Int),
    ("LongStorage", "int64", Kind::Int64),
    ("HalfStorage", "float16", Kind::Half),
    ("BFloat16Storage", "bfloat16", Kind::BFloat16),
    ("FloatStorage", "float32", Kind::Float),
    ("DoubleStorage", "float64", Kind::Double),
];

impl Global {
    /// The global of this name, if it is allowed.
    pub(super) fn find(module: &str, name: &str) -> Result<Self, String> {
        let found = match (module, name) {
            ("collections", "OrderedDict") | ("builtins" | "__builtin__", "dict") => {
                Some(Self::Mapping)
            }
            ("collections", "defaultdict") => Some(Self::DefaultDict),
            // `state` of the reference's checkpoints; a subclass of `dict` with nothing of its own.
            (module, "DotDict") if module.starts_with("framework.") => Some(Self::Mapping),
            ("builtins" | "__builtin__", "set" | "frozenset") => Some(Self::Set),
            ("builtins" | "__builtin__", "list") => Some(Self::List),
            ("builtins" | "__builtin__", "tuple") => Some(Self::Tuple),
            ("_codecs", "encode") => Some(Self::Encode),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Self::RebuildParameter),
            ("torch", "Size") => Some(Self::Size),
            ("torch", "device") => Some(Self::Device),
            ("torch", name) => KINDS.iter().find_map(|&(storage, dtype, kind)| {
                if name == storage {
                    Some(Self::StorageOf(kind))
                } else {
                    (name == dtype).then_some(Self::DType(kind))
                }
            }),
            ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => {
                Some(Self::NumpyScalar)
            }
            ("numpy", "dtype") => Some(Self::NumpyType),
            _ => None,
        };
        found.ok_or_else(|| {
            format!(
                "it wants to call `{}.{}`, which is not among the allowed functions and classes",
                shortened(module),
                shortened(name)
            )
        })
    }

    /// Calls it. Tensors and storages are only described; no data is read.
    pub(super) fn call(self, args: &[Id], nodes: &[Node]) -> Result<Node, String> {
        let args: Vec<&Node> = args.iter().map(|&Id(id)| &nodes[id as usize]).collect();
        match (self, args.as_slice()) {
            (Self::Mapping, []) | (Self::DefaultDict, [] | [_]) => Ok(Node::Dict(Vec::new())),
            (Self::Mapping, [Node::Dict(entries)]) => Ok(Node::Dict(entries.clone())),
            (Self::Set, []) => Ok(Node::Set(Vec::new())),
            (Self::Set, [Node::List(items) | Node::Set(items)]) => Ok(Node::Set(items.clone())),
            (Self::Set, [Node::Tuple(items)]) => Ok(Node::Set(items.to_vec())),
            (Self::List, []) => Ok(Node::List(Vec::new())),
            (Self::Tuple | Self::Size, []) => Ok(Node::Tuple(Box::default())),
            (Self::Tuple | Self::Size, [Node::Tuple(items)]) => Ok(Node::Tuple(items.clone())),
            (Self::Tuple | Self::Size, [Node::List(items)]) => {
                Ok(Node::Tuple(items.clone().into_boxed_slice()))
            }
            (Self::Encode, [Node::Text(text), Node::Text(_)]) => latin1(text),
            (Self::Device, [Node::Text(name)]) => Ok(Node::Text(name.clone())),
            (Self::Device, [Node::Text(name), Node::Int(index)]) => {
                Ok(Node::Text(format!("{}:{index}", shortened(name)).into()))
            }
            (Self::RebuildTensor, [storage, offset, shape, stride, ..]) => {
                let tensor = tensor_ref(storage, offset, shape, stride, nodes)?;
                Ok(Node::Tensor(Box::new(tensor)))
            }
            (Self::RebuildParameter, [Node::Tensor(tensor), ..]) => {
                Ok(Node::Tensor(tensor.clone()))
            }
            (Self::NumpyType, [Node::Text(code), ..]) => Ok(Node::NumpyType(code.clone())),
            (Self::NumpyScalar, [Node::NumpyType(code), Node::Bytes(bytes)]) => {
                numpy_scalar(code, bytes)
            }
            (global, args) => {
                let kinds: Vec<&str> = args.iter().take(8).map(|arg| arg.kind()).collect();
                Err(format!("it calls {global:?} with {kinds:?}"))
            }
        }
    }
}

/// How many values a call is charged for: what it copies, at most.
pub(super) fn call_size(args: &[Id], nodes: &[Node]) -> usize {
    let size = |&Id(id): &Id| match &nodes[id as usize] {
        Node::List(items) | Node::Set(items) => items.len(),
        Node::Tuple(items) => items.len(),
        Node::Dict(entries) => 2 * entries.len(),
        Node::Text(text) => text.len() / 16,
        Node::Bytes(bytes) => bytes.len() / 16,
        // A shape and its strides have up to 64 dimensions of 8 bytes each, a value takes 32 bytes.
        Node::Storage(_) | Node::Tensor(_) => 32,
        _ => 1,
    };
    1 + args.iter().map(size).sum::<usize>()
}

/// What `persistent_load` would make of `("storage", class, key, location, numel)`.
pub(super) fn storage(id: &Node, nodes: &[Node]) -> Result<Node, String> {
    let Node::Tuple(parts) = id else {
        return Err(format!("a persistent id is a {}", id.kind()));
    };
    let parts: Vec<&Node> = parts.iter().map(|&Id(id)| &nodes[id as usize]).collect();
    match parts.as_slice() {
        [
            Node::Text(tag),
            Node::Global(Global::StorageOf(kind)),
            Node::Text(key),
            Node::Text(_),
            Node::Int(numel),
        ] if tag.as_ref() == "storage" && key.len() < 100 => {
            let numel = u64::try_from(*numel)
                .ok()
                .filter(|&numel| numel.checked_mul(kind.elt_size_in_bytes() as u64).is_some());
            Ok(Node::Storage(Box::new(Storage {
                kind: *kind,
                key: key.to_string(),
                numel: numel.ok_or("a storage has a negative or huge size")?,
            })))
        }
        _ => Err("a persistent id is not that of a storage".to_owned()),
    }
}

fn tensor_ref(
    storage: &Node,
    offset: &Node,
    shape: &Node,
    stride: &Node,
    nodes: &[Node],
) -> Result<TensorRef, String> {
    let Node::Storage(storage) = storage else {
        return Err(format!("a tensor is made from a {}", storage.kind()));
    };
    let Node::Int(offset) = offset else {
        return Err(format!("a tensor's offset is a {}", offset.kind()));
    };
    let (shape, stride) = (sizes(shape, nodes)?, sizes(stride, nodes)?);
    let outside = || {
        format!(
            "a tensor of shape {shape:?} with strides {stride:?} at {offset} is outside its storage of {} elements",
            storage.numel
        )
    };
    let offset = u64::try_from(*offset).map_err(|_| outside())?;
    if shape.len() != stride.len() || shape.iter().chain(&stride).any(|&size| size < 0) {
        return Err(outside());
    }
    let span = if shape.contains(&0) {
        Some(0)
    } else {
        shape
            .iter()
            .zip(&stride)
            .try_fold(1u64, |span, (&dim, &step)| {
                span.checked_add((dim.unsigned_abs() - 1).checked_mul(step.unsigned_abs())?)
            })
    };
    // Also the product of the dimensions has to be a number, since a stride may be 0.
    let numel = shape
        .iter()
        .try_fold(1i64, |numel, &dim| numel.checked_mul(dim))
        .or_else(|| shape.contains(&0).then_some(0));
    let span = span
        .filter(|&span| {
            offset
                .checked_add(span)
                .is_some_and(|end| end <= storage.numel)
        })
        .ok_or_else(outside)?;
    numel.ok_or_else(outside)?;
    Ok(TensorRef {
        storage: storage.as_ref().clone(),
        offset,
        shape,
        stride,
        span,
    })
}

fn sizes(node: &Node, nodes: &[Node]) -> Result<Vec<i64>, String> {
    let Node::Tuple(items) = node else {
        return Err(format!("a shape is a {}", node.kind()));
    };
    if items.len() > MAX_DIMENSIONS {
        return Err(format!("a tensor has {} dimensions", items.len()));
    }
    let size = |&Id(id): &Id| match &nodes[id as usize] {
        Node::Int(size) => i64::try_from(*size).map_err(|_| format!("a dimension is {size}")),
        other => Err(format!("a dimension is a {}", other.kind())),
    };
    items.iter().map(size).collect()
}

fn latin1(text: &str) -> Result<Node, String> {
    let byte = |char| u8::try_from(char).map_err(|_| "bytes hold a character".to_owned());
    let bytes: Result<Box<[u8]>, String> = text.chars().map(byte).collect();
    Ok(Node::Bytes(bytes?))
}

/// Little endian; [`super::machine`] refuses the other order.
fn numpy_scalar(code: &str, bytes: &[u8]) -> Result<Node, String> {
    let int = |is_signed: bool| {
        let sign = is_signed && bytes.last().is_some_and(|&byte| byte > 127);
        let mut wide = [if sign { u8::MAX } else { 0 }; 16];
        wide[..bytes.len()].copy_from_slice(bytes);
        Node::Int(i128::from_le_bytes(wide))
    };
    let malformed = || {
        format!(
            "a numpy number of type `{}` has {} bytes",
            shortened(code),
            bytes.len()
        )
    };
    match (code, bytes.len()) {
        ("f8", _) => {
            let bytes = bytes.try_into().map_err(|_| malformed())?;
            Ok(Node::Float(f64::from_le_bytes(bytes)))
        }
        ("f4", _) => {
            let bytes = bytes.try_into().map_err(|_| malformed())?;
            Ok(Node::Float(f32::from_le_bytes(bytes).into()))
        }
        ("b1", 1) => Ok(Node::Bool(bytes != [0])),
        ("i1", 1) | ("i2", 2) | ("i4", 4) | ("i8", 8) => Ok(int(true)),
        ("u1", 1) | ("u2", 2) | ("u4", 4) | ("u8", 8) => Ok(int(false)),
        _ => Err(malformed()),
    }
}

/// Texts of a hostile file are shown, but not at length, and not with control characters.
pub(super) fn shortened(text: &str) -> String {
    text.chars()
        .take(60)
        .flat_map(char::escape_default)
        .collect()
}
