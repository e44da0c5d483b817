//! Reads what `torch.save` wrote: `.pth`, `.ckpt` and `.pt` files since PyTorch 1.6.
//!
//! ```text
//! zip archive, nothing compressed
//!     <root>/data.pkl      pickle: dictionaries, numbers, texts; a tensor is a storage's key, offset, shape, strides
//!     <root>/data/<key>    a storage: elements of one type
//!     <root>/byteorder     `little`, if it is there
//! ```
//!
//! Python's own reader runs what the pickle names. This one does not: [`machine`] builds plain values, [`globals`]
//! lists the few calls it understands, and everything else is an error that names it. A file from anywhere costs at
//! most memory of [`MAX_EXPANSION`] times its own size and a few hundred megabytes, and never a panic.
//!
//! What the values mean (parameters, arguments, optimizer) is not known here.

mod archive;
mod crc;
mod globals;
mod machine;
mod value;

use std::cell::Cell;
use std::path::{Path, PathBuf};

use tch::Tensor;

use super::CheckpointError;
use archive::Archive;
use value::Pickle;
pub(super) use value::{TensorRef, Value};

/// A checkpoint of 200,000 tensors has about as much.
const MAX_PICKLE_BYTES: u64 = 32 << 20;
/// How much larger than the file its tensors may be. Shared storages and strides of 0 make them larger; no checkpoint
/// of ours has many of those.
const MAX_EXPANSION: u64 = 4;
/// What also a small file may expand to.
const MIN_BUDGET_BYTES: u64 = 64 << 20;

/// An opened file. Tensors are read one by one, when they are asked for.
#[derive(Debug)]
pub(super) struct PyTorchFile {
    path: PathBuf,
    archive: Archive,
    root: String,
    pickle: Pickle,
    /// Bytes that may still be read.
    budget: Cell<u64>,
}

/// Whether the file starts as a zip archive does.
pub(super) fn is_zip(path: &Path) -> bool {
    let mut start = [0; 4];
    std::fs::File::open(path)
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut start))
        .is_ok_and(|()| start.starts_with(b"PK"))
}

impl PyTorchFile {
    /// Opens `path` and reads everything but the tensors' data.
    ///
    /// # Errors
    /// If it cannot be read, is not such a file, is damaged, or names what is not allowed.
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let refuse = |why| refusal(path, why);
        let archive = Archive::open(path).map_err(refuse)?;
        let mut pickles = archive
            .names()
            .filter_map(|name| name.strip_suffix("/data.pkl"))
            .filter(|root| !root.contains('/'));
        let (Some(root), None) = (pickles.next(), pickles.next()) else {
            return Err(refuse("it has no `data.pkl`, or several".to_owned()));
        };
        let root = root.to_owned();
        drop(pickles);
        let order_entry = format!("{root}/byteorder");
        if let Ok(n_bytes) = archive.bytes_of(&order_entry) {
            let order = archive.read(&order_entry, 0..n_bytes).map_err(refuse)?;
            if order != b"little" {
                return Err(refuse("its numbers are not little endian".to_owned()));
            }
        }
        let entry = format!("{root}/data.pkl");
        let n_bytes = archive.bytes_of(&entry).map_err(refuse)?;
        if n_bytes > MAX_PICKLE_BYTES {
            return Err(refuse(format!(
                "its `data.pkl` has {n_bytes} bytes, more than {MAX_PICKLE_BYTES}"
            )));
        }
        let bytes = archive.read(&entry, 0..n_bytes).map_err(refuse)?;
        let pickle = machine::read(&bytes).map_err(|why| {
            let fix = "only if you trust where it is from, load it in Python, which runs what it names, and store its \
                parameters alone: `torch.save({\"model\": model.state_dict()}, path)`";
            CheckpointError::foreign(path, why, fix)
        })?;
        let budget = archive.n_bytes().saturating_mul(MAX_EXPANSION);
        Ok(Self {
            path: path.to_owned(),
            budget: Cell::new(budget.max(MIN_BUDGET_BYTES)),
            archive,
            root,
            pickle,
        })
    }

    /// What was saved.
    pub(super) fn root(&self) -> Value<'_> {
        self.pickle.root()
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file.
    pub(super) fn n_bytes(&self) -> u64 {
        self.archive.n_bytes()
    }

    /// Reads a tensor to the CPU, contiguous.
    ///
    /// # Errors
    /// If its storage is missing, too short or damaged, or all that was read is far more than the file holds.
    pub(super) fn tensor(&self, tensor: &TensorRef) -> Result<Tensor, CheckpointError> {
        let refuse = |why| refusal(&self.path, why);
        let storage = &tensor.storage;
        let width = storage.kind.elt_size_in_bytes() as u64;
        let entry = format!("{}/data/{}", self.root, storage.key);
        let stored = self.archive.bytes_of(&entry).map_err(refuse)?;
        // Checked when the pickle was read: the product is a number.
        if stored != storage.numel * width {
            return Err(refuse(format!(
                "storage `{}` has {stored} bytes, its pickle says {} elements of {width} bytes",
                storage.key, storage.numel
            )));
        }
        let cost = tensor
            .numel()
            .saturating_add(tensor.span)
            .saturating_mul(width);
        let rest = self.budget.get().checked_sub(cost).ok_or_else(|| {
            refuse(format!(
                "its tensors are more than {MAX_EXPANSION} times as large as the file"
            ))
        })?;
        self.budget.set(rest);

        let begin = tensor.offset * width;
        let bytes = self
            .archive
            .read(&entry, begin..begin + tensor.span * width)
            .map_err(refuse)?;
        let n_elements = i64::try_from(tensor.span).unwrap_or(i64::MAX);
        Tensor::f_from_data_size(&bytes, &[n_elements], storage.kind)
            .and_then(|flat| flat.f_as_strided(&tensor.shape, &tensor.stride, 0))
            .and_then(|view| view.f_contiguous())
            .map_err(|source| CheckpointError::tensor(&entry, &source))
    }

    /// Compares the checksums of all entries.
    ///
    /// # Errors
    /// For the first entry that is damaged.
    pub(super) fn verify(&self) -> Result<(), CheckpointError> {
        for name in self.archive.names() {
            self.archive
                .bytes_of(name)
                .and_then(|n_bytes| self.archive.read(name, 0..n_bytes))
                .map_err(|why| refusal(&self.path, why))?;
        }
        Ok(())
    }
}

fn refusal(path: &Path, why: String) -> CheckpointError {
    let fix = "copy it again, or store it again with `torch.save` of PyTorch 1.6 or newer";
    CheckpointError::foreign(path, why, fix)
}

#[cfg(test)]
mod tests;
