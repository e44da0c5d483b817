//! The kernels of one device and element type: compiled once, kept on disk by what they depend on, loaded once.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_uint};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use moeut_plugin_api::PluginError;
use sha2::{Digest, Sha256};
use tch::Kind;

use crate::driver::{DeviceContext, Driver, KernelFunction, driver};
use crate::nvrtc::nvrtc;

/// The kernels; an element type is chosen when they are compiled.
const SOURCE: &str = concat!(
    include_str!("kernels.cu"),
    include_str!("stream.cu"),
    include_str!("select.cu"),
    include_str!("loss.cu"),
    include_str!("hopper.cu")
);

/// Compute capability that the kernels need: asynchronous copies and products of bfloat16.
const MIN_CAPABILITY_MAJOR: i32 = 8;

/// Shared memory of a block that computes tiles: six operands of 128 × 64 elements.
pub(crate) const TILE_SHARED_BYTES: c_uint = 6 * 128 * 64 * 2;

/// Names in [`SOURCE`], in the order of [`Entry`].
const NAMES: [&CStr; 29] = [
    c"list_tiles",
    c"product",
    c"product_transposed",
    c"product_wide",
    c"product_wide_transposed",
    c"up",
    c"down_backward",
    c"rank_experts",
    c"outer_product",
    c"sum_rows",
    c"sum_and_dot_rows",
    c"weigh_rows",
    c"dot_rows",
    c"normalize",
    c"normalize_odd",
    c"normalize_backward",
    c"normalize_backward_odd",
    c"rotate",
    c"rotate_split",
    c"rotate_odd",
    c"select_32",
    c"select_256",
    c"select_512",
    c"select_1024",
    c"scan_chunks",
    c"place_selections",
    c"select_backward",
    c"cross_entropy",
    c"cross_entropy_backward",
];

/// Shared memory of a block of the kernels for warpgroups: four stages of three times 128 × 64 elements.
pub(crate) const GROUP_SHARED_BYTES: c_uint = 4 * 3 * 128 * 64 * 2;

/// Shared memory of a block of those among them that keep their rows: 256 rows of 128 elements twice, and five times 64
/// columns of a matrix.
pub(crate) const WIDE_SHARED_BYTES: c_uint = (2 * 256 + 5 * 64) * 128 * 2;

/// Names of what else there is for GPUs of [`HOPPER`], in the order of [`Entry`], after those above, each with the
/// shared memory of a block.
const GROUP_NAMES: [(&CStr, c_uint); 10] = [
    (c"product_in_groups", GROUP_SHARED_BYTES),
    (c"product_transposed_in_groups", GROUP_SHARED_BYTES),
    (c"up_in_groups", GROUP_SHARED_BYTES),
    (c"down_backward_in_groups", GROUP_SHARED_BYTES),
    (c"outer_product_tall", GROUP_SHARED_BYTES),
    (c"outer_product_broad", GROUP_SHARED_BYTES),
    (c"product_wide_in_groups", WIDE_SHARED_BYTES),
    (c"product_wide_transposed_in_groups", WIDE_SHARED_BYTES),
    (c"added_product", WIDE_SHARED_BYTES),
    (c"added_product_transposed", WIDE_SHARED_BYTES),
];

/// The compute capability whose tensor cores work for warpgroups.
const HOPPER: (i32, i32) = (9, 0);

/// The kernels of [`SOURCE`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum Entry {
    ListTiles,
    Product,
    ProductTransposed,
    ProductWide,
    ProductWideTransposed,
    Up,
    DownBackward,
    RankExperts,
    OuterProduct,
    SumRows,
    SumAndDotRows,
    WeighRows,
    DotRows,
    Normalize,
    NormalizeOdd,
    NormalizeBackward,
    NormalizeBackwardOdd,
    Rotate,
    RotateSplit,
    RotateOdd,
    Select32,
    Select256,
    Select512,
    Select1024,
    ScanChunks,
    PlaceSelections,
    SelectBackward,
    CrossEntropy,
    CrossEntropyBackward,
    ProductInGroups,
    ProductTransposedInGroups,
    UpInGroups,
    DownBackwardInGroups,
    OuterProductTall,
    OuterProductBroad,
    ProductWideInGroups,
    ProductWideTransposedInGroups,
    AddedProduct,
    AddedProductTransposed,
}

/// The kernels of one device and element type, ready to be launched.
pub(crate) struct Module {
    pub(crate) driver: &'static Driver,
    pub(crate) context: DeviceContext,
    /// Blocks that run at the same time if each takes a whole multiprocessor.
    pub(crate) n_multiprocessors: i64,
    functions: Vec<KernelFunction>,
}

impl Module {
    /// Whether it has the kernels for warpgroups.
    pub(crate) fn has_groups(&self) -> bool {
        self.functions.len() > NAMES.len()
    }

    pub(crate) fn function(&self, entry: Entry) -> KernelFunction {
        self.functions[entry as usize]
    }
}

/// The modules of this process.
pub(crate) struct Modules {
    folder: PathBuf,
    loaded: Mutex<HashMap<(usize, bool), Arc<Module>>>,
}

impl Modules {
    /// Keeps compiled code in `folder`.
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            loaded: Mutex::default(),
        }
    }

    /// The kernels for the `index`-th CUDA device and bfloat16 or float16.
    ///
    /// # Errors
    /// If the device is too old, or the code does not compile or load.
    pub(crate) fn get(&self, index: usize, kind: Kind) -> Result<Arc<Module>, PluginError> {
        let is_f16 = kind == Kind::Half;
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = loaded.get(&(index, is_f16)) {
            return Ok(Arc::clone(module));
        }
        let module = Arc::new(self.load(index, is_f16)?);
        loaded.insert((index, is_f16), Arc::clone(&module));
        Ok(module)
    }

    fn load(&self, index: usize, is_f16: bool) -> Result<Module, PluginError> {
        let driver = driver().map_err(|why| needs_gpu(&why))?;
        let capability = driver.capability(index).map_err(|why| needs_gpu(&why))?;
        if capability.0 < MIN_CAPABILITY_MAJOR {
            return Err(too_old(index, capability));
        }
        let wrong = |why: String| {
            PluginError::new("the kernels of kernel `cuda` cannot be made ready")
                .why(why)
                .fix("set `-moe.kernel grouped`")
        };
        let context = driver.context(index).map_err(wrong)?;
        let n_multiprocessors = driver.n_multiprocessors(index).map_err(wrong)?;
        let build = Build::new(capability, is_f16).map_err(wrong)?;
        let path = self.folder.join(build.file_name());
        let of_hopper = if capability == HOPPER {
            &GROUP_NAMES[..]
        } else {
            &[]
        };
        let load = |code: &[u8]| {
            let everywhere = NAMES.into_iter().map(|name| (name, TILE_SHARED_BYTES));
            driver.load(context, code, everywhere.chain(of_hopper.iter().copied()))
        };
        // What is on disk but does not load is made anew, like what is not there.
        let kept = read_checked(&path).map(|code| load(&code));
        let functions = if let Some(Ok(functions)) = kept {
            functions
        } else {
            let code = build.compile().map_err(wrong)?;
            let functions = load(&code).map_err(wrong)?;
            // A cache that cannot be written costs the next start some seconds and nothing else.
            let _not_kept = write_checked(&path, &code);
            functions
        };
        Ok(Module {
            driver,
            context,
            n_multiprocessors: n_multiprocessors.into(),
            functions,
        })
    }
}

/// Everything that the machine code depends on.
struct Build {
    options: Vec<CString>,
    key: String,
}

impl Build {
    fn new(capability: (i32, i32), is_f16: bool) -> Result<Self, String> {
        let (major, minor) = capability;
        // What only one GPU has is not compiled without its letter.
        let letter = if capability == HOPPER { "a" } else { "" };
        let mut options = vec![
            format!("--gpu-architecture=sm_{major}{minor}{letter}"),
            "--std=c++17".to_owned(),
            "-default-device".to_owned(),
        ];
        if is_f16 {
            options.push("-DIS_F16".to_owned());
        }
        let version = nvrtc()?.version()?;
        let mut hash = Sha256::new();
        hash.update(format!("{version:?} {options:?}\n{SOURCE}"));
        let options: Result<_, _> = options.into_iter().map(CString::new).collect();
        Ok(Self {
            options: options.map_err(|error| error.to_string())?,
            key: format!("{:x}", hash.finalize()),
        })
    }

    fn file_name(&self) -> String {
        format!("{}.cubin", self.key)
    }

    fn compile(&self) -> Result<Vec<u8>, String> {
        let source = CString::new(SOURCE).map_err(|error| error.to_string())?;
        nvrtc()?.compile(&source, &self.options)
    }
}

/// Bytes of the checksum in front of the code.
const CHECKSUM_BYTES: usize = 32;

/// The code in a file, if its checksum holds.
fn read_checked(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    if bytes.len() < CHECKSUM_BYTES {
        return None;
    }
    let code = bytes.split_off(CHECKSUM_BYTES);
    (Sha256::digest(&code)[..] == bytes[..]).then_some(code)
}

/// Writes a file that is either whole or not there.
fn write_checked(path: &Path, code: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let beside = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut file = fs::File::create(&beside)?;
    file.write_all(&Sha256::digest(code))?;
    file.write_all(code)?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

/// The answer on a machine without a GPU.
pub(crate) fn needs_gpu(why: &str) -> PluginError {
    PluginError::new("kernel `cuda` needs an NVIDIA GPU and its driver")
        .why(why)
        .fix("set `-moe.kernel grouped`, which also runs on the CPU")
}

fn too_old(index: usize, (major, minor): (i32, i32)) -> PluginError {
    PluginError::new("kernel `cuda` needs a GPU of compute capability 8.0 or later")
        .why(format!("GPU {index} has {major}.{minor}"))
        .fix("set `-moe.kernel grouped`")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only where the compiler is installed; no GPU is needed to compile.
    #[test]
    fn the_kernels_compile_for_every_architecture_and_type() {
        if nvrtc().is_err() {
            return;
        }
        for capability in [(8, 0), (8, 6), (9, 0)] {
            for is_f16 in [false, true] {
                let code = Build::new(capability, is_f16).and_then(|build| build.compile());
                assert!(
                    code.as_ref().is_ok_and(|code| code.starts_with(b"\x7fELF")),
                    "{code:?}"
                );
            }
        }
    }

    #[test]
    fn damaged_code_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/x.cubin");
        write_checked(&path, b"code").unwrap();
        assert_eq!(read_checked(&path).unwrap(), b"code");
        let mut bytes = fs::read(&path).unwrap();
        bytes[CHECKSUM_BYTES] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(read_checked(&path), None);
        fs::write(&path, b"short").unwrap();
        assert_eq!(read_checked(&path), None);
        assert_eq!(read_checked(&folder.path().join("absent")), None);
    }

    #[test]
    fn an_old_gpu_is_refused_with_a_way_out() {
        let error = too_old(1, (7, 5));
        assert_eq!(error.why, "GPU 1 has 7.5");
        assert_eq!(error.fix, "set `-moe.kernel grouped`");
    }

    #[test]
    fn names_and_entries_agree() {
        assert_eq!(Entry::ProductInGroups as usize, NAMES.len());
        let n_names = NAMES.len() + GROUP_NAMES.len();
        assert_eq!(Entry::AddedProductTransposed as usize + 1, n_names);
        for name in NAMES.into_iter().chain(GROUP_NAMES.map(|(name, _)| name)) {
            let declared = format!(" {}(const __grid_constant__ ", name.to_string_lossy());
            assert!(SOURCE.contains(&declared), "{declared}");
        }
    }
}
