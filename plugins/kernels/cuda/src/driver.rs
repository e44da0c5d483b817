//! NVIDIA's driver, opened when somebody needs it: contexts, modules, launches. Handles are as plain as the driver's
//! own; what keeps them valid is in [`crate::module`].

#![expect(unsafe_code, reason = "opens a library and calls its C functions")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

use libloading::os::unix::Library;

const N_MULTIPROCESSORS: c_int = 16;
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
/// Attributes of a function: bytes of shared memory that a launch may ask for, and the percentage of the L1 cache that
/// becomes shared memory.
const MAX_DYNAMIC_SHARED_BYTES: c_int = 8;
const SHARED_MEMORY_CARVEOUT: c_int = 9;

/// A pointer of the driver's. It is only ever handed back to the driver, which may be called from any thread.
#[derive(Debug, Clone, Copy)]
struct Handle(*mut c_void);

// SAFETY: see above.
unsafe impl Send for Handle {}
// SAFETY: see above.
unsafe impl Sync for Handle {}

/// The context of a device that libtorch works in, too.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceContext(Handle);

/// A kernel of a loaded module; modules are never unloaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KernelFunction(Handle);

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LaunchShape {
    pub(crate) n_blocks: c_uint,
    pub(crate) n_threads: c_uint,
    pub(crate) shared_bytes: c_uint,
}

/// The functions of the library, which stays open until the process ends.
pub(crate) struct Driver {
    error_name: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int,
    device: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int,
    retain_primary: unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int,
    push_context: unsafe extern "C" fn(*mut c_void) -> c_int,
    pop_context: unsafe extern "C" fn(*mut *mut c_void) -> c_int,
    load_module: unsafe extern "C" fn(*mut *mut c_void, *const c_void) -> c_int,
    function: unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const c_char) -> c_int,
    set_function_attribute: unsafe extern "C" fn(*mut c_void, c_int, c_int) -> c_int,
    launch: unsafe extern "C" fn(
        *mut c_void,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        *mut c_void,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> c_int,
}

/// The driver of this machine.
///
/// # Errors
/// Why there is none.
pub(crate) fn driver() -> Result<&'static Driver, String> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    DRIVER
        .get_or_init(Driver::open)
        .as_ref()
        .map_err(Clone::clone)
}

impl Driver {
    fn open() -> Result<Self, String> {
        // SAFETY: the driver's library, which libtorch opens in the same way.
        let library = unsafe { Library::new("libcuda.so.1") }
            .map_err(|_| "there is no `libcuda.so.1`, which NVIDIA's driver installs".to_owned())?;
        let driver =
            Self::of(library).map_err(|error| format!("the driver is too old: {error}"))?;
        driver
            .device(0)
            .map_err(|error| format!("the driver shows no GPU: {error}"))?;
        Ok(driver)
    }

    fn of(library: Library) -> Result<Self, libloading::Error> {
        // SAFETY: the names are those of the driver's documented functions, the types of the fields their C types.
        // `cuInit` takes no pointer, and its failure shows in every later call.
        unsafe {
            let init: unsafe extern "C" fn(c_uint) -> c_int = *library.get(b"cuInit\0")?;
            init(0);
            let driver = Self {
                error_name: *library.get(b"cuGetErrorName\0")?,
                device: *library.get(b"cuDeviceGet\0")?,
                attribute: *library.get(b"cuDeviceGetAttribute\0")?,
                retain_primary: *library.get(b"cuDevicePrimaryCtxRetain\0")?,
                push_context: *library.get(b"cuCtxPushCurrent_v2\0")?,
                pop_context: *library.get(b"cuCtxPopCurrent_v2\0")?,
                load_module: *library.get(b"cuModuleLoadData\0")?,
                function: *library.get(b"cuModuleGetFunction\0")?,
                set_function_attribute: *library.get(b"cuFuncSetAttribute\0")?,
                launch: *library.get(b"cuLaunchKernel\0")?,
            };
            std::mem::forget(library);
            Ok(driver)
        }
    }

    /// Major and minor compute capability of the `index`-th device; the driver and libtorch count alike.
    ///
    /// # Errors
    /// The driver's name of what is wrong.
    pub(crate) fn capability(&self, index: usize) -> Result<(c_int, c_int), String> {
        let device = self.device(index)?;
        Ok((
            self.attribute(device, CAPABILITY_MAJOR)?,
            self.attribute(device, CAPABILITY_MINOR)?,
        ))
    }

    /// Multiprocessors of the `index`-th device.
    ///
    /// # Errors
    /// As [`Self::capability`].
    pub(crate) fn n_multiprocessors(&self, index: usize) -> Result<c_int, String> {
        self.attribute(self.device(index)?, N_MULTIPROCESSORS)
    }

    /// The context that libtorch uses on the `index`-th device. It is kept until the process ends.
    ///
    /// # Errors
    /// As [`Self::capability`].
    pub(crate) fn context(&self, index: usize) -> Result<DeviceContext, String> {
        let device = self.device(index)?;
        let mut context = ptr::null_mut();
        // SAFETY: `context` lives through the call, `device` is the driver's.
        self.check(unsafe { (self.retain_primary)(&raw mut context, device) })?;
        Ok(DeviceContext(Handle(context)))
    }

    /// Loads machine code and finds its kernels by name, each with the bytes of shared memory that it may use.
    ///
    /// # Errors
    /// As [`Self::capability`], also for code that is damaged or of another device.
    pub(crate) fn load<'a>(
        &self,
        context: DeviceContext,
        code: &[u8],
        kernels: impl Iterator<Item = (&'a CStr, c_uint)>,
    ) -> Result<Vec<KernelFunction>, String> {
        self.within(context, || {
            let mut module = ptr::null_mut();
            // SAFETY: the driver reads the length of the code from its header, and refuses what is none; the compiler
            // made it, or a checksum says that the compiler made it.
            self.check(unsafe { (self.load_module)(&raw mut module, code.as_ptr().cast()) })?;
            let mut functions = Vec::new();
            for (name, shared_bytes) in kernels {
                let mut function = KernelFunction(Handle(ptr::null_mut()));
                // SAFETY: `module` was loaded above, `name` ends in a zero.
                self.check(unsafe {
                    (self.function)(&raw mut function.0.0, module, name.as_ptr())
                })?;
                for (attribute, value) in [
                    (MAX_DYNAMIC_SHARED_BYTES, shared_bytes.cast_signed()),
                    (SHARED_MEMORY_CARVEOUT, 100),
                ] {
                    // SAFETY: `function` was found above.
                    self.check(unsafe {
                        (self.set_function_attribute)(function.0.0, attribute, value)
                    })?;
                }
                functions.push(function);
            }
            Ok(functions)
        })
    }

    /// Queues a kernel whose one parameter is `parameters`.
    ///
    /// # Safety
    /// The kernel takes exactly one parameter, of the layout of `P`; all pointers in it are to memory of the device, as
    /// large as the kernel reads or writes, that stays valid in the order of `stream`; `stream` belongs to `context`.
    ///
    /// # Errors
    /// As [`Self::capability`]. What goes wrong inside the kernel shows in a later call.
    pub(crate) unsafe fn launch<P>(
        &self,
        context: DeviceContext,
        function: KernelFunction,
        shape: LaunchShape,
        stream: *mut c_void,
        parameters: &P,
    ) -> Result<(), String> {
        let mut pointers = [ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        self.within(context, || {
            // SAFETY: the driver copies the parameter during the call, in the size that the kernel declares, and does
            // not write to it. The rest is the caller's promise.
            self.check(unsafe {
                (self.launch)(
                    function.0.0,
                    shape.n_blocks,
                    1,
                    1,
                    shape.n_threads,
                    1,
                    1,
                    shape.shared_bytes,
                    stream,
                    pointers.as_mut_ptr(),
                    ptr::null_mut(),
                )
            })
        })
    }

    /// Runs `body` with `context` current on this thread, and restores what was current.
    fn within<T>(
        &self,
        context: DeviceContext,
        body: impl FnOnce() -> Result<T, String>,
    ) -> Result<T, String> {
        // SAFETY: the context is retained until the process ends.
        self.check(unsafe { (self.push_context)(context.0.0) })?;
        let outcome = body();
        let mut popped = ptr::null_mut();
        // SAFETY: takes away what was pushed above.
        self.check(unsafe { (self.pop_context)(&raw mut popped) })?;
        outcome
    }

    fn attribute(&self, device: c_int, attribute: c_int) -> Result<c_int, String> {
        let mut value = 0;
        // SAFETY: `value` lives through the call, `device` is the driver's.
        self.check(unsafe { (self.attribute)(&raw mut value, attribute, device) })?;
        Ok(value)
    }

    fn device(&self, index: usize) -> Result<c_int, String> {
        let index = c_int::try_from(index).map_err(|error| error.to_string())?;
        let mut device = 0;
        // SAFETY: `device` lives through the call.
        self.check(unsafe { (self.device)(&raw mut device, index) })?;
        Ok(device)
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        let mut name = ptr::null();
        // SAFETY: the driver writes a pointer to a static text, or null for a number that it does not know.
        let is_known = unsafe { (self.error_name)(code, &raw mut name) } == 0 && !name.is_null();
        if !is_known {
            return Err(format!("error {code} of the driver"));
        }
        // SAFETY: see above.
        let name = unsafe { CStr::from_ptr(name) };
        Err(name.to_string_lossy().into_owned())
    }
}
