//! Writes a checkpoint as the reference does with `torch.save`: the same archive, the same pickle instructions.
//!
//! Files that PyTorch itself wrote are in `fixtures/pytorch`; this is for those that are too large to keep or hold what
//! only a test knows. It shares no code with the reader in the host.

use crate::sandbox::read;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// A tensor's bytes, in row-major order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawTensor {
    /// As safetensors name it: `F32`, `I64`.
    pub dtype: String,
    /// Sizes.
    pub shape: Vec<usize>,
    /// Little endian.
    pub bytes: Vec<u8>,
}

/// Tensors by name, in the order of the modules.
pub type RawTensors = Vec<(String, RawTensor)>;

/// The tensors of a safetensors file, in the order of its header.
pub fn read_safetensors(file: &[u8]) -> RawTensors {
    let (length, rest) = file.split_at(8);
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    let (header, data) = rest.split_at(usize::try_from(length).expect("a header fits memory"));
    let header: serde_json::Map<String, Value> =
        serde_json::from_slice(header).expect("the header is JSON");
    let number = |value: &Value| {
        let number = value.as_u64().expect("a number");
        usize::try_from(number).expect("it fits memory")
    };
    let numbers = |value: &Value| -> Vec<usize> {
        value
            .as_array()
            .expect("a list")
            .iter()
            .map(number)
            .collect()
    };
    header
        .into_iter()
        .map(|(name, entry)| {
            let span = numbers(&entry["data_offsets"]);
            let tensor = RawTensor {
                dtype: entry["dtype"].as_str().expect("a type").to_owned(),
                shape: numbers(&entry["shape"]),
                bytes: data[span[0]..span[1]].to_vec(),
            };
            (name, tensor)
        })
        .collect()
}

/// What the reference saves.
#[derive(Debug, Default)]
pub struct ReferenceRun {
    /// Optimizer steps.
    pub step: u32,
    /// Raw arguments.
    pub args: BTreeMap<String, String>,
    /// Parameters and buffers.
    pub model: RawTensors,
    /// For each parameter in order its state, by PyTorch's names.
    pub optimizer: Vec<RawTensors>,
}

impl ReferenceRun {
    /// A checkpoint of ours as the reference would have written it: the same numbers in its file format.
    pub fn of_checkpoint(folder: &Path, step: u32) -> Self {
        let tensors = |file: &str| read_safetensors(&read(&folder.join(file)));
        let model = tensors("model.safetensors");
        let state: BTreeMap<String, _> = tensors("optimizer.safetensors").into_iter().collect();
        let slot = |name: &String| -> Option<RawTensors> {
            ["step", "exp_avg", "exp_avg_sq"]
                .iter()
                .map(|key| {
                    Some((
                        (*key).to_owned(),
                        state.get(&format!("{key}/{name}"))?.clone(),
                    ))
                })
                .collect()
        };
        let args = serde_json::from_slice(&read(&folder.join("args.json")));
        Self {
            step,
            args: args.expect("the checkpoint has its arguments"),
            optimizer: model.iter().filter_map(|(name, _)| slot(name)).collect(),
            model,
        }
    }

    /// The bytes of the `.pth` file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut file = Pickle::default();
        file.raw(b"\x80\x02");
        file.dict(|file| {
            file.text("state");
            // The class of the reference's dictionary; its arguments are empty, as for every subclass of `dict`.
            file.raw(b"cframework.data_structures.dotdict\nDotDict\n)\x81(");
            file.text("iter");
            file.int(self.step);
            file.text("epoch");
            file.int(0);
            file.raw(b"u");
            file.text("run_invariants");
            file.dict(|file| {
                file.text("args");
                file.dict(|file| {
                    for (flag, value) in &self.args {
                        file.text(flag);
                        file.text(value);
                    }
                });
            });
            file.text("sampler");
            file.dict(|file| {
                file.text("pos");
                // Ahead of what was consumed, as the reference's is.
                file.int(self.step + 6);
            });
            file.text("optimizer");
            file.dict(|file| self.write_optimizer(file));
            file.text("model");
            file.dict(|file| {
                for (name, tensor) in &self.model {
                    file.text(name);
                    file.tensor(tensor);
                }
            });
        });
        file.raw(b".");
        let mut entries = vec![("archive/data.pkl".to_owned(), file.bytes)];
        for (key, storage) in file.storages.into_iter().enumerate() {
            entries.push((format!("archive/data/{key}"), storage));
        }
        zipped(&entries)
    }

    fn write_optimizer(&self, file: &mut Pickle) {
        file.text("state");
        file.dict(|file| {
            for (index, slot) in (0..).zip(&self.optimizer) {
                file.int(index);
                file.dict(|file| {
                    for (key, tensor) in slot {
                        file.text(key);
                        file.tensor(tensor);
                    }
                });
            }
        });
        file.text("param_groups");
        file.raw(b"](");
        file.dict(|file| {
            file.text("params");
            file.raw(b"](");
            for (index, _) in (0..).zip(&self.optimizer) {
                file.int(index);
            }
            file.raw(b"e");
        });
        file.raw(b"e");
    }
}

/// A pickle of protocol 2 and the storages that it refers to.
#[derive(Default)]
struct Pickle {
    bytes: Vec<u8>,
    storages: Vec<Vec<u8>>,
}

impl Pickle {
    fn raw(&mut self, instructions: &[u8]) {
        self.bytes.extend(instructions);
    }

    fn text(&mut self, text: &str) {
        let length = u32::try_from(text.len()).expect("a short text");
        self.raw(b"X");
        self.raw(&length.to_le_bytes());
        self.raw(text.as_bytes());
    }

    fn int(&mut self, number: u32) {
        self.raw(b"J");
        self.raw(&number.to_le_bytes());
    }

    fn dict(&mut self, fill: impl FnOnce(&mut Self)) {
        self.raw(b"}(");
        fill(self);
        self.raw(b"u");
    }

    fn sizes(&mut self, sizes: &[usize]) {
        self.raw(b"(");
        for &size in sizes {
            self.int(u32::try_from(size).expect("a small tensor"));
        }
        self.raw(b"t");
    }

    fn tensor(&mut self, tensor: &RawTensor) {
        let class = match tensor.dtype.as_str() {
            "F32" => "FloatStorage",
            "F64" => "DoubleStorage",
            "I64" => "LongStorage",
            other => panic!("no test has tensors of type {other}"),
        };
        let numel: usize = tensor.shape.iter().product();
        self.raw(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage");
        self.raw(format!("ctorch\n{class}\n").as_bytes());
        self.text(&self.storages.len().to_string());
        self.text("cpu");
        self.int(u32::try_from(numel).expect("a small tensor"));
        self.raw(b"tQ");
        self.int(0);
        self.sizes(&tensor.shape);
        let mut strides = vec![1; tensor.shape.len()];
        for axis in (1..tensor.shape.len()).rev() {
            strides[axis - 1] = strides[axis] * tensor.shape[axis];
        }
        self.sizes(&strides);
        self.raw(b"\x89ccollections\nOrderedDict\n)RtR");
        self.storages.push(tensor.bytes.clone());
    }
}

/// A zip archive with nothing compressed.
fn zipped(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let word = |number: usize| u32::try_from(number).expect("a small file").to_le_bytes();
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let name_size = u16::try_from(name.len())
            .expect("a short name")
            .to_le_bytes();
        let size = word(data.len());
        let mut common = vec![0; 10];
        common.extend([crc32(data).to_le_bytes(), size, size].concat());
        common.extend(name_size);
        common.extend([0; 2]);
        directory.extend(b"PK\x01\x02\0\0");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(word(file.len()));
        directory.extend(name.as_bytes());
        file.extend(b"PK\x03\x04");
        file.extend(&common);
        file.extend(name.as_bytes());
        file.extend(data);
    }
    let end = [word(directory.len()), word(file.len())].concat();
    file.extend(&directory);
    file.extend(b"PK\x05\x06\0\0\0\0\0\0\0\0");
    file.extend(end);
    file.extend([0; 2]);
    file
}

/// Bit by bit: slow, and not the host's.
fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}
