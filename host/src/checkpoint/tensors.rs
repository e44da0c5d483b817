//! The safetensors format: named tensors in one file.
//!
//! ```text
//! u64 little endian: length of the header | header, JSON | data
//! header = {"<name>": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …}
//! ```
//!
//! Written here and not with tch's own functions for two reasons: tch holds the whole file in memory, and it writes
//! where we could not compute the checksum on the way. A file is untrusted input: no length in it is believed before
//! it was compared with the size of the file.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use super::CheckpointError;

/// The limit of the format's own library; 400,000 tensors fit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Data starts at a multiple of this, so that a reader may map the file and use the tensors in place.
const ALIGNMENT: usize = 8;

/// Every kind that both libtorch and the format know.
const DTYPES: [(&str, Kind); 10] = [
    ("BOOL", Kind::Bool),
    ("U8", Kind::Uint8),
    ("I8", Kind::Int8),
    ("I16", Kind::Int16),
    ("I32", Kind::Int),
    ("I64", Kind::Int64),
    ("F16", Kind::Half),
    ("BF16", Kind::BFloat16),
    ("F32", Kind::Float),
    ("F64", Kind::Double),
];

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<i64>,
    data_offsets: [u64; 2],
}

/// Writes `tensors` (any device, any strides) to `out`; `path` is for the messages.
///
/// The data lies in the order of falling element size, as other writers do it, so that every tensor is aligned; the
/// header keeps the caller's order, which is the order that [`read_tensors`] returns.
///
/// # Errors
/// [`CheckpointError::Tensor`] for a kind that the format lacks, [`CheckpointError::Io`] if `out` refuses.
pub fn write_tensors(
    out: &mut dyn Write,
    path: &Path,
    tensors: &[(String, Tensor)],
) -> Result<(), CheckpointError> {
    let mut by_size: Vec<usize> = (0..tensors.len()).collect();
    by_size.sort_by_key(|&i| std::cmp::Reverse(tensors[i].1.kind().elt_size_in_bytes()));
    let mut offsets = vec![[0; 2]; tensors.len()];
    let mut end = 0;
    for &i in &by_size {
        let tensor = &tensors[i].1;
        let begin = end;
        end += tensor.numel() * tensor.kind().elt_size_in_bytes();
        offsets[i] = [begin, end];
    }

    let mut header = Map::new();
    for ((name, tensor), data_offsets) in tensors.iter().zip(&offsets) {
        let dtype = dtype_of(tensor.kind()).ok_or_else(|| CheckpointError::Tensor {
            name: name.clone(),
            why: format!(
                "kind {:?} has no name in the safetensors format",
                tensor.kind()
            ),
        })?;
        let entry = json!({"dtype": dtype, "shape": tensor.size(), "data_offsets": data_offsets});
        if header.insert(name.clone(), entry).is_some() {
            return Err(CheckpointError::Tensor {
                name: name.clone(),
                why: "two tensors have this name".to_owned(),
            });
        }
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');

    let io = || CheckpointError::io("write", path);
    out.write_all(&(text.len() as u64).to_le_bytes())
        .map_err(io())?;
    out.write_all(&text).map_err(io())?;
    let mut bytes = Vec::new();
    for i in by_size {
        let (name, tensor) = &tensors[i];
        bytes.resize(offsets[i][1] - offsets[i][0], 0);
        tensor
            .f_contiguous()
            .and_then(|tensor| tensor.f_copy_data_u8(&mut bytes, tensor.numel()))
            .map_err(|source| CheckpointError::tensor(name, &source))?;
        out.write_all(&bytes).map_err(io())?;
    }
    Ok(())
}

/// The format's name of a kind.
pub(super) fn dtype_of(kind: Kind) -> Option<&'static str> {
    DTYPES
        .iter()
        .find(|(_, known)| *known == kind)
        .map(|(name, _)| *name)
}

/// Reads the tensors of `path` to the CPU, in the order of the header.
///
/// # Errors
/// [`CheckpointError::Corrupt`] for whatever the format does not allow, [`CheckpointError::Io`] if it cannot be read.
pub fn read_tensors(path: &Path) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    let io = || CheckpointError::io("read", path);
    let corrupt = |why: String| CheckpointError::corrupt(path, why);

    let mut file = std::fs::File::open(path).map_err(io())?;
    let n_bytes = file.metadata().map_err(io())?.len();
    let mut word = [0; 8];
    if n_bytes < 8 {
        return Err(corrupt(format!("{n_bytes} bytes are too few for a header")));
    }
    file.read_exact(&mut word).map_err(io())?;
    let header_bytes = u64::from_le_bytes(word);
    if header_bytes > MAX_HEADER_BYTES.min(n_bytes - 8) {
        return Err(corrupt(format!(
            "its header claims {header_bytes} bytes, the file has {n_bytes}"
        )));
    }
    let mut text = Vec::new();
    (&mut file)
        .take(header_bytes)
        .read_to_end(&mut text)
        .map_err(io())?;
    let header: Map<String, Value> = serde_json::from_slice(&text)
        .map_err(|error| corrupt(format!("its header is not JSON: {error}")))?;
    let entries = check_header(header, n_bytes - 8 - header_bytes).map_err(corrupt)?;

    entries
        .into_iter()
        .map(|(name, kind, entry)| {
            let [begin, end] = entry.data_offsets;
            file.seek(SeekFrom::Start(8 + header_bytes + begin))
                .map_err(io())?;
            let mut bytes = Vec::new();
            let n_read = (&mut file)
                .take(end - begin)
                .read_to_end(&mut bytes)
                .map_err(io())?;
            if n_read as u64 != end - begin {
                return Err(corrupt(format!("it ends inside tensor `{name}`")));
            }
            let tensor = Tensor::f_from_data_size(&bytes, &entry.shape, kind)
                .map_err(|source| CheckpointError::tensor(&name, &source))?;
            Ok((name, tensor))
        })
        .collect()
}

/// Checks that the entries cover the data exactly, without overlap: then no entry, and not their sum either, asks for
/// more memory than the file has bytes.
fn check_header(
    header: Map<String, Value>,
    data_bytes: u64,
) -> Result<Vec<(String, Kind, Entry)>, String> {
    let mut entries = Vec::with_capacity(header.len());
    for (name, value) in header {
        if name == "__metadata__" {
            continue;
        }
        let entry: Entry = serde_json::from_value(value)
            .map_err(|error| format!("tensor `{name}` is ill described: {error}"))?;
        let kind = DTYPES
            .iter()
            .find(|(dtype, _)| *dtype == entry.dtype)
            .map(|(_, kind)| *kind)
            .ok_or_else(|| format!("tensor `{name}` has the unknown type `{}`", entry.dtype))?;
        let expected = entry
            .shape
            .iter()
            .try_fold(kind.elt_size_in_bytes() as u64, |bytes, &dim| {
                bytes.checked_mul(u64::try_from(dim).ok()?)
            });
        let [begin, end] = entry.data_offsets;
        if end
            .checked_sub(begin)
            .is_none_or(|given| Some(given) != expected)
        {
            return Err(format!(
                "tensor `{name}` of shape {:?} and type `{}` does not fit its bytes {begin}..{end}",
                entry.shape, entry.dtype
            ));
        }
        entries.push((name, kind, entry));
    }

    let mut spans: Vec<[u64; 2]> = entries
        .iter()
        .map(|(_, _, entry)| entry.data_offsets)
        .collect();
    spans.sort_unstable();
    let mut covered = 0;
    for [begin, end] in spans {
        if begin != covered {
            return Err(format!(
                "its tensors leave a gap or overlap at byte {covered}"
            ));
        }
        covered = end;
    }
    if covered == data_bytes {
        Ok(entries)
    } else {
        Err(format!(
            "its tensors need {covered} bytes, the file holds {data_bytes}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn write(path: &Path, tensors: &[(String, Tensor)]) {
        let mut file = std::fs::File::create(path).unwrap();
        write_tensors(&mut file, path, tensors).unwrap();
    }

    #[test]
    fn every_kind_and_shape_comes_back_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let mut tensors: Vec<(String, Tensor)> = DTYPES
            .iter()
            .map(|(name, kind)| {
                let values = Tensor::arange(6, (Kind::Float, Device::Cpu));
                ((*name).to_owned(), values.view([2, 3]).to_kind(*kind))
            })
            .collect();
        tensors.push((
            "empty".to_owned(),
            Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)),
        ));
        tensors.push(("scalar".to_owned(), Tensor::from(3.5f64)));
        let columns = Tensor::arange(6, (Kind::Int64, Device::Cpu))
            .view([2, 3])
            .tr();
        tensors.push(("transposed \"name\"".to_owned(), columns));
        write(&path, &tensors);

        let back = read_tensors(&path).unwrap();
        assert_eq!(back.len(), tensors.len());
        for ((name, tensor), (name_back, tensor_back)) in tensors.iter().zip(&back) {
            assert_eq!(name, name_back);
            assert_eq!(tensor.kind(), tensor_back.kind());
            assert_eq!(tensor.size(), tensor_back.size());
            assert!(tensor.equal(tensor_back), "{name}");
        }
    }

    #[test]
    fn the_library_that_tch_uses_reads_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        write(
            &path,
            &[
                ("rng".to_owned(), Tensor::from_slice(&[1u8, 2, 3])),
                ("w".to_owned(), Tensor::from_slice(&[0.5f32, -1.0])),
            ],
        );
        let mut back = Tensor::read_safetensors(&path).unwrap();
        back.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(Vec::<u8>::try_from(&back[0].1).unwrap(), [1, 2, 3]);
        assert_eq!(Vec::<f32>::try_from(&back[1].1).unwrap(), [0.5, -1.0]);
    }

    fn read_bytes(header_bytes: u64, header: &str, data: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let bytes = [&header_bytes.to_le_bytes(), header.as_bytes(), data].concat();
        std::fs::write(&path, bytes).unwrap();
        match read_tensors(&path).unwrap_err() {
            CheckpointError::Corrupt { why, .. } => why,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn hostile_headers_are_errors_and_never_allocations() {
        let entry = |shape: &str, offsets: &str| {
            format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let read = |header: &str| read_bytes(header.len() as u64, header, &[0; 8]);

        assert!(read_bytes(u64::MAX, "{}", &[]).contains("claims 18446744073709551615 bytes"));
        assert!(read_bytes(99, "{}", &[]).contains("claims 99 bytes"));
        assert!(read("{").contains("not JSON"));
        assert!(read(&"[".repeat(100_000)).contains("not JSON"));
        assert!(read(&entry("[2]", "[0,9]")).contains("does not fit"));
        assert!(read(&entry("[2]", "[8,0]")).contains("does not fit"));
        assert!(read(&entry("[-2]", "[0,8]")).contains("does not fit"));
        assert!(read(&entry("[4611686018427387904,4]", "[0,0]")).contains("does not fit"));
        assert!(read(&entry("[1099511627776]", "[0,4398046511104]")).contains("the file holds 8"));
        assert!(read(&entry("[1]", "[4,8]")).contains("gap or overlap at byte 0"));
        assert!(read(&entry("[2]", "[0,8]").replace("F32", "F8")).contains("unknown type `F8`"));
        assert!(read(r#"{"w": 3}"#).contains("ill described"));
        assert!(read("{}").contains("need 0 bytes, the file holds 8"));
    }
}
