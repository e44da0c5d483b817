//! Files of PyTorch, files that lie, and files that were damaged.

use std::io::Write;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tch::{Kind, Tensor};

use super::crc::crc32;
use super::machine;
use super::{PyTorchFile, Value};
use crate::checkpoint::CheckpointError;

/// Made by PyTorch; `make.py` beside them says how.
fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/e2e/fixtures/pytorch"
    ))
    .join(name)
}

/// A zip archive as `torch.save` writes it, but for the 64-bit records.
fn zipped(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let size = u32::try_from(data.len()).unwrap().to_le_bytes();
        let name_size = u16::try_from(name.len()).unwrap().to_le_bytes();
        let at = u32::try_from(file.len()).unwrap().to_le_bytes();
        let crc = crc32(data).to_le_bytes();
        // Version, flags, method (stored), time, date; checksum, twice the size, lengths of name and extra field.
        let common = [&[0; 10][..], &crc, &size, &size, &name_size, &[0; 2]].concat();
        file.extend([b"PK\x03\x04", &common[..], name.as_bytes(), data].concat());
        directory.extend(
            [
                b"PK\x01\x02",
                &[0; 2][..],
                &common,
                &[0; 10],
                &at,
                name.as_bytes(),
            ]
            .concat(),
        );
    }
    let at = u32::try_from(file.len()).unwrap().to_le_bytes();
    let size = u32::try_from(directory.len()).unwrap().to_le_bytes();
    [
        &file[..],
        &directory,
        b"PK\x05\x06",
        &[0; 8],
        &size,
        &at,
        &[0; 2],
    ]
    .concat()
}

fn open_bytes(bytes: &[u8]) -> Result<PyTorchFile, CheckpointError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    PyTorchFile::open(file.path())
}

fn why<T: std::fmt::Debug>(result: Result<T, CheckpointError>) -> String {
    match result.unwrap_err() {
        CheckpointError::Foreign { why, .. } => why,
        other => panic!("{other}"),
    }
}

/// Opens a file with this pickle and one storage of eight bytes.
fn open_pickle(pickle: &[u8]) -> Result<PyTorchFile, CheckpointError> {
    open_bytes(&zipped(&[
        ("a/data.pkl", pickle),
        ("a/data/0", &[1, 0, 0, 0, 2, 0, 0, 0]),
    ]))
}

/// `_rebuild_tensor_v2` of an int32 storage of two elements, with these instructions as offset, shape and strides.
fn tensor(view: &[u8]) -> Vec<u8> {
    let storage = b"((X\x07\0\0\0storagectorch\nIntStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ";
    let head: &[u8] = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n";
    [head, storage, view, b"\x89NtRs."].concat()
}

fn read_view(view: &[u8]) -> Result<Vec<i32>, CheckpointError> {
    let file = open_pickle(&tensor(view))?;
    let read = file.tensor(file.root().get("w").unwrap().as_tensor().unwrap())?;
    Ok(Vec::<i32>::try_from(read.flatten(0, -1)).unwrap())
}

#[test]
fn every_kind_and_view_of_pytorch_is_read() {
    let file = PyTorchFile::open(&fixture("kinds.pth")).unwrap();
    let model = file.root().get("model").unwrap();
    let read = |name: &str| {
        let value = model.get(name).unwrap_or_else(|| panic!("{name}"));
        file.tensor(value.as_tensor().unwrap()).unwrap()
    };
    let numbers: Vec<f64> = (0..12).map(f64::from).collect();
    for (name, kind) in [
        ("uint8", Kind::Uint8),
        ("int8", Kind::Int8),
        ("int16", Kind::Int16),
        ("int32", Kind::Int),
        ("int64", Kind::Int64),
        ("float16", Kind::Half),
        ("bfloat16", Kind::BFloat16),
        ("float32", Kind::Float),
        ("float64", Kind::Double),
    ] {
        let tensor = read(name);
        assert_eq!((tensor.kind(), tensor.size()), (kind, vec![3, 4]), "{name}");
        assert_eq!(values(&tensor), numbers, "{name}");
    }
    assert_eq!(read("bool").kind(), Kind::Bool);
    for (name, shape, expected) in [
        (
            "bool",
            &[3, 4][..],
            &[0., 0., 0., 0., 0., 0., 1., 1., 1., 1., 1., 1.][..],
        ),
        (
            "transposed",
            &[4, 3],
            &[0., 4., 8., 1., 5., 9., 2., 6., 10., 3., 7., 11.],
        ),
        ("column", &[3], &[1., 5., 9.]),
        ("shared_row", &[4], &[8., 9., 10., 11.]),
        ("every_other", &[6], &[1., 3., 5., 7., 9., 11.]),
        ("expanded", &[3, 2], &[7.; 6]),
        ("scalar", &[], &[3.5]),
        ("empty", &[0, 4], &[]),
        ("parameter", &[2], &[1., 2.]),
    ] {
        let tensor = read(name);
        assert_eq!(tensor.size(), shape, "{name}");
        assert_eq!(values(&tensor), expected, "{name}");
        assert!(tensor.is_contiguous(), "{name}");
    }
    file.verify().unwrap();
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

#[test]
fn plain_values_of_python_are_read() {
    let file = PyTorchFile::open(&fixture("kinds.pth")).unwrap();
    let plain = file.root().get("plain").unwrap();
    let shown: Vec<String> = plain
        .entries()
        .map(|(key, value)| {
            let text = value.to_argument().unwrap_or_else(|| "-".to_owned());
            format!("{} {} {text}", key.as_str().unwrap(), value.kind())
        })
        .collect();
    assert_eq!(
        shown,
        [
            "none None none",
            "yes bool 1",
            "no bool 0",
            "small int 5",
            "negative int -300",
            "word int 70000",
            "wide int 1099511627776",
            "huge int -1267650600228229401496703205376",
            "float float 0.0000000025",
            "infinite float inf",
            "text str süß",
            "bytes bytes -",
            "list list 1,a,0.5",
            "tuple tuple 1,2,3,4",
            "set set 9",
            "size tuple 2,3",
            "np_float float 0.25",
            "np_int int -7",
            "dtype class -",
            "device str cuda:1",
            "default dict -",
        ]
    );
}

#[test]
fn code_is_not_run_but_named() {
    assert_eq!(
        why(PyTorchFile::open(&fixture("hostile.pth")))
            .split(": ")
            .last()
            .unwrap(),
        "it wants to call `posix.system`, which is not among the allowed functions and classes"
    );
    // By the other instruction, and with a name that would upset a terminal.
    let by_stack = b"\x80\x04\x8c\x02os\x8c\x07\x1b[2Jrun\x93)R.";
    assert!(why(open_pickle(by_stack)).contains(r"`os.\u{1b}[2Jrun`"));
    // What is allowed by itself cannot be turned into something else.
    assert!(
        why(open_pickle(
            b"ccollections\nOrderedDict\nX\x01\0\0\0a\x85R."
        ))
        .contains("calls Mapping")
    );
    assert!(why(open_pickle(b"X\x01\0\0\0a)R.")).contains("a str is called"));
    assert!(why(open_pickle(b"K\x01}b.")).contains("attributes of a int"));
}

#[test]
fn views_outside_their_storage_are_refused() {
    assert_eq!(read_view(b"K\x00K\x02\x85K\x01\x85").unwrap(), [1, 2]);
    assert_eq!(read_view(b"K\x01K\x01\x85K\x01\x85").unwrap(), [2]);
    for view in [
        &b"K\x00K\x03\x85K\x01\x85"[..],
        b"K\x01K\x02\x85K\x01\x85",
        b"K\x00K\x02\x85K\x02\x85",
        b"J\xff\xff\xff\xffK\x01\x85K\x01\x85",
        b"K\x00J\xff\xff\xff\xff\x85K\x01\x85",
        b"K\x00K\x02\x85J\xff\xff\xff\xff\x85",
        b"K\x00K\x02\x85K\x01K\x01\x86",
        b"K\x03))",
    ] {
        assert!(
            why(read_view(view)).contains("is outside its storage"),
            "{view:?}"
        );
    }
    assert!(why(read_view(b"K\x00]K\x01\x85")).contains("a shape is a list"));
    // 2^62 · 2 elements of stride 0; 2^40 of them.
    let huge = b"K\x00\x8a\x08\0\0\0\0\0\0\0\x40K\x02\x86K\x00K\x00\x86";
    assert!(why(read_view(huge)).contains("is outside its storage"));
    let large = b"K\x00\x8a\x06\0\0\0\0\0\x01\x85K\x00\x85";
    assert!(why(read_view(large)).contains("times as large as the file"));
}

#[test]
fn archives_that_contradict_themselves_are_refused() {
    let good = tensor(b"K\x00K\x02\x85K\x01\x85");
    let read = |entries: &[(&str, &[u8])]| {
        let file = open_bytes(&zipped(entries))?;
        let read = file.tensor(file.root().get("w").unwrap().as_tensor().unwrap());
        read.map(|tensor| values(&tensor))
    };
    let data: &[u8] = &[1, 0, 0, 0, 2, 0, 0, 0];
    let pickle = ("a/data.pkl", &good[..]);
    assert_eq!(read(&[pickle, ("a/data/0", data)]).unwrap(), [1.0, 2.0]);
    for (entries, expected) in [
        (&[("a/data/0", data)][..], "no `data.pkl`, or several"),
        (
            &[pickle, ("b/data.pkl", &good)],
            "no `data.pkl`, or several",
        ),
        (&[pickle], "no entry `a/data/0`"),
        (
            &[pickle, ("a/data/0", &data[..7])],
            "has 7 bytes, its pickle says 2 elements",
        ),
        (&[pickle, ("a/byteorder", b"big")], "not little endian"),
    ] {
        assert!(why(read(entries)).contains(expected), "{expected}");
    }
    let mut compressed = zipped(&[pickle, ("a/data/0", data)]);
    let directory = compressed
        .windows(4)
        .rposition(|window| window == b"PK\x01\x02")
        .unwrap();
    compressed[directory + 10] = 8;
    let file = open_bytes(&compressed).unwrap();
    let error = file.tensor(file.root().get("w").unwrap().as_tensor().unwrap());
    assert!(why(error).contains("is compressed"));
    assert!(why(open_bytes(b"")).contains("no zip archive"));
    assert!(why(open_bytes(&[0x80, 2, b'.'])).contains("no zip archive"));
}

/// Values are in an arena, so neither depth nor repetition costs what it seems to.
#[test]
fn pickles_that_would_fill_the_memory_are_refused_or_harmless() {
    let nested = [&b"]".repeat(100_000)[..], &b"a".repeat(99_999), b"."].concat();
    let pickle = machine::read(&nested).unwrap();
    assert_eq!(pickle.root().tensors(), []);
    drop(pickle);

    // Each tuple holds the one before it twice: 2^1000 values, were they copied.
    let doubled = [b")".to_vec(), b"2\x86".repeat(1000), b".".to_vec()].concat();
    assert_eq!(machine::read(&doubled).unwrap().root().tensors(), []);

    // A list that holds itself.
    let cycle = machine::read(b"]q\0h\0a.").unwrap();
    assert_eq!(cycle.root().tensors(), []);
    assert_eq!(cycle.root().to_argument(), None);

    // A set is made of one large list again and again.
    let list = [b"](".to_vec(), b"N".repeat(100_000), b"eq\0".to_vec()].concat();
    let again = b"cbuiltins\nset\nh\0\x85R0".repeat(1000);
    let error = machine::read(&[&list[..], &again, b"."].concat()).unwrap_err();
    assert!(error.contains("more than 8388608 values"), "{error}");

    let wide = [b"(".to_vec(), b"N".repeat(9 << 20), b"t.".to_vec()].concat();
    assert!(
        machine::read(&wide)
            .unwrap_err()
            .contains("more than 8388608 values")
    );
    assert!(
        machine::read(b"B\xff\xff\xff\xff")
            .unwrap_err()
            .contains("cut off")
    );
    assert!(
        machine::read(b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff")
            .unwrap_err()
            .contains("cut off")
    );
}

fn all_values(file: &PyTorchFile) -> Result<Vec<(String, Vec<f64>)>, CheckpointError> {
    let tensors = file.root().tensors().into_iter();
    tensors
        .map(|(name, tensor)| Ok((name, values(&file.tensor(tensor)?))))
        .collect()
}

#[test]
fn a_file_that_is_cut_off_anywhere_is_an_error() {
    let whole = std::fs::read(fixture("kinds.pth")).unwrap();
    for n_bytes in 0..whole.len() {
        let cut = &whole[..n_bytes];
        // The end record is followed by nothing.
        let result = open_bytes(cut).and_then(|file| all_values(&file));
        assert!(result.is_err(), "{n_bytes}");
    }
}

#[test]
fn a_pickle_that_is_cut_off_anywhere_is_an_error() {
    let pickle = pickle_of("run.pth");
    assert!(machine::read(&pickle).is_ok());
    for n_bytes in 0..pickle.len() {
        assert!(machine::read(&pickle[..n_bytes]).is_err(), "{n_bytes}");
    }
}

fn pickle_of(name: &str) -> Vec<u8> {
    let archive = super::Archive::open(&fixture(name)).unwrap();
    let entry = archive.names().find(|name| name.ends_with("/data.pkl"));
    let entry = entry.unwrap().to_owned();
    let n_bytes = archive.bytes_of(&entry).unwrap();
    archive.read(&entry, 0..n_bytes).unwrap()
}

fn walk(value: Value<'_>) -> usize {
    value.entries().count() + value.items().len() + value.tensors().len()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// One flipped bit anywhere in a file is noticed or has no effect: it never loads as other numbers.
    #[test]
    fn a_flipped_bit_never_loads_as_other_numbers(at in 0usize..6019, bit in 0u8..8) {
        let mut bytes = std::fs::read(fixture("kinds.pth")).unwrap();
        let good = all_values(&open_bytes(&bytes).unwrap()).unwrap();
        bytes[at] ^= 1 << bit;
        if let Ok(values) = open_bytes(&bytes).and_then(|file| all_values(&file)) {
            prop_assert_eq!(values, good);
        }
    }

    /// Whatever a pickle says, reading it ends without a panic.
    #[test]
    fn a_changed_pickle_never_panics(changes in prop::collection::vec((0usize..4000, any::<u8>()), 1..6)) {
        let mut pickle = pickle_of("run.pth");
        for (at, byte) in changes {
            let at = at % pickle.len();
            pickle[at] = byte;
        }
        if let Ok(pickle) = machine::read(&pickle) {
            walk(pickle.root());
        }
    }

    /// Also if it is made of instructions only.
    #[test]
    fn random_instructions_never_panic(
        ops in prop::collection::vec(prop::sample::select(
            &b"()]}N.012KMJqrhjaesutldRbQcGX\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x8f\x90\x91\x93\x94"[..]), 0..200),
    ) {
        if let Ok(pickle) = machine::read(&ops) {
            walk(pickle.root());
        }
    }
}
