//! NVIDIA's run-time compiler, opened when somebody needs it: it comes with libtorch's CUDA libraries, and no CUDA
//! toolkit has to be installed.

#![expect(unsafe_code, reason = "opens a library and calls its C functions")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Names under which the compiler is found, the one of libtorch's own CUDA version first.
const NAMES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];

/// Where pip puts the compiler, as seen from the folder of libtorch's libraries.
const BESIDE_LIBTORCH: [&str; 2] = ["../../nvidia/cu13/lib", "../../nvidia/cuda_nvrtc/lib"];

type Program = *mut c_void;

/// The functions of the library, which stays open until the process ends.
pub(crate) struct Nvrtc {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    error_text: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    code_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    code: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
}

/// The compiler of this machine.
///
/// # Errors
/// Where it was looked for, if it is nowhere.
pub(crate) fn nvrtc() -> Result<&'static Nvrtc, String> {
    static NVRTC: OnceLock<Result<Nvrtc, String>> = OnceLock::new();
    NVRTC
        .get_or_init(Nvrtc::open)
        .as_ref()
        .map_err(Clone::clone)
}

impl Nvrtc {
    fn open() -> Result<Self, String> {
        let folders: Vec<PathBuf> = libtorch_folder()
            .iter()
            .flat_map(|folder| BESIDE_LIBTORCH.map(|beside| folder.join(beside)))
            .collect();
        let by_name = NAMES.iter().map(PathBuf::from);
        let by_path = folders
            .iter()
            .flat_map(|folder| NAMES.map(|name| folder.join(name)));
        for candidate in by_name.chain(by_path) {
            if let Some(folder) = candidate.parent().filter(|folder| folder.is_absolute()) {
                open_builtins(folder);
            }
            if let Some(library) = open_library(&candidate) {
                return Self::of(library)
                    .map_err(|error| format!("`{}`: {error}", candidate.display()));
            }
        }
        Err(format!(
            "there is no `{}`, neither on the library path nor in `{}`",
            NAMES[0],
            folders.first().map_or_else(
                || "nvidia/cu13/lib".into(),
                |folder| folder.to_string_lossy()
            )
        ))
    }

    fn of(library: Library) -> Result<Self, libloading::Error> {
        // SAFETY: the names are those of NVRTC's documented functions, the types of the fields their C types.
        unsafe {
            let nvrtc = Self {
                version: *library.get(b"nvrtcVersion\0")?,
                error_text: *library.get(b"nvrtcGetErrorString\0")?,
                create: *library.get(b"nvrtcCreateProgram\0")?,
                compile: *library.get(b"nvrtcCompileProgram\0")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0")?,
                log: *library.get(b"nvrtcGetProgramLog\0")?,
                code_size: *library.get(b"nvrtcGetCUBINSize\0")?,
                code: *library.get(b"nvrtcGetCUBIN\0")?,
                destroy: *library.get(b"nvrtcDestroyProgram\0")?,
            };
            std::mem::forget(library);
            Ok(nvrtc)
        }
    }

    /// Major and minor.
    ///
    /// # Errors
    /// NVRTC's text.
    pub(crate) fn version(&self) -> Result<(c_int, c_int), String> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are to integers that live through the call.
        self.check(unsafe { (self.version)(&raw mut major, &raw mut minor) })?;
        Ok((major, minor))
    }

    /// Machine code of `source`, compiled with `options`.
    ///
    /// # Errors
    /// The compiler's log.
    pub(crate) fn compile(&self, source: &CStr, options: &[CString]) -> Result<Vec<u8>, String> {
        let mut program = ptr::null_mut();
        // SAFETY: `source` ends in a zero; there are no headers, so both lists may be null.
        self.check(unsafe {
            (self.create)(
                &raw mut program,
                source.as_ptr(),
                c"kernels.cu".as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            )
        })?;
        let code = self.compile_program(program, options);
        // SAFETY: `create` made the program, and nobody uses it from here on.
        self.check(unsafe { (self.destroy)(&raw mut program) })?;
        code
    }

    fn compile_program(&self, program: Program, options: &[CString]) -> Result<Vec<u8>, String> {
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let n_options = c_int::try_from(options.len()).map_err(|error| error.to_string())?;
        // SAFETY: `n_options` texts that end in a zero and live through the call.
        let outcome = unsafe { (self.compile)(program, n_options, options.as_ptr()) };
        if let Err(error) = self.check(outcome) {
            let log = self.read(program, self.log_size, self.log)?;
            let log = String::from_utf8_lossy(&log);
            return Err(format!("{error}: {}", log.trim_end_matches(['\0', '\n'])));
        }
        self.read(program, self.code_size, self.code)
    }

    /// One of the program's two texts, by the function for its size and the function that copies it.
    fn read(
        &self,
        program: Program,
        size_of: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        copy: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, String> {
        let mut size = 0;
        // SAFETY: the program is alive, and `size` lives through the call.
        self.check(unsafe { size_of(program, &raw mut size) })?;
        let mut bytes = vec![0_u8; size];
        // SAFETY: the function writes the `size` bytes that it announced.
        self.check(unsafe { copy(program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: NVRTC has a static text for every number.
        let text = unsafe { CStr::from_ptr((self.error_text)(code)) };
        Err(text.to_string_lossy().into_owned())
    }
}

/// The compiler looks for its second library by name alone and would not find it in its own folder.
fn open_builtins(folder: &Path) {
    let Ok(files) = folder.read_dir() else { return };
    let mut names: Vec<PathBuf> = files.flatten().map(|file| file.path()).collect();
    names.sort();
    for path in names {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("libnvrtc-builtins.so")
            && let Some(library) = open_library(&path)
        {
            std::mem::forget(library);
        }
    }
}

fn open_library(path: &Path) -> Option<Library> {
    // SAFETY: a library of NVIDIA, whose constructors only set up the library itself.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.ok()
}

/// The folder of the libtorch in this process.
fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps
        .lines()
        .find(|line| line.ends_with("/libtorch_cpu.so"))?;
    Some(Path::new(&line[line.find('/')?..]).parent()?.to_owned())
}
