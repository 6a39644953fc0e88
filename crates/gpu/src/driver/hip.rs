//! AMD's GPUs through libamdhip64, which is looked for at run time: a program with this feature starts without it. The functions
//! are declared here by hand, as HIP 6 and 7 define them. Knows no operation.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::Arc;

use libloading::Library;

use super::device::{Api, Device, Handle, params};
use super::nccl::Connected;
use super::{DeviceInfo, DevicePtr, DriverError, Launch, Rows};
use crate::kernels::{self, Image};

/// As `hipRuntimeGetVersion` counts: HIP 6.0.
const NEEDED_VERSION: c_int = 60_000_000;
/// Where a ROCm installation has it, after the places that the linker knows.
const LIBRARIES: [&str; 4] =
    ["libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "/opt/rocm/lib/libamdhip64.so"];
const OUT_OF_MEMORY: c_int = 2;
const NO_DEVICE: c_int = 100;
const NOT_READY: c_int = 600;
const HOST_TO_DEVICE: c_int = 1;
const DEVICE_TO_HOST: c_int = 2;
const DEVICE_TO_DEVICE: c_int = 3;
const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_DISABLE_TIMING: c_uint = 2;
const CAPTURE_THREAD_LOCAL: c_int = 1;
const ATTRIBUTE_MULTIPROCESSOR_COUNT: c_int = 63;
const ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: c_int = 74;
/// More than `hipDeviceProp_t` of any version takes (1,472 bytes in HIP 6).
const PROPERTIES_BYTES: usize = 16 << 10;
/// Threads of a wave on the architectures that there are code objects for.
const WAVE: u32 = 64;

type Ptr = *mut c_void;

/// The functions that are used, each under its own name.
macro_rules! functions {
    ($($name:ident($($arg:ty),*) -> $result:ty;)*) => {
        #[allow(non_snake_case)]
        struct Functions {
            $($name: unsafe extern "C" fn($($arg),*) -> $result,)*
            properties: unsafe extern "C" fn(Ptr, c_int) -> c_int,
            // Holds the addresses above.
            _library: Library,
        }

        impl Functions {
            fn find(library: Library) -> Result<Self, libloading::Error> {
                // SAFETY: the functions have these types in HIP 6 and 7. The structure that the last one fills is larger under
                // its new name.
                unsafe {
                    let properties = library
                        .get(b"hipGetDevicePropertiesR0600\0")
                        .or_else(|_| library.get(b"hipGetDeviceProperties\0"))
                        .map(|found| *found)?;
                    Ok(Self { $($name: *library.get(concat!(stringify!($name), "\0").as_bytes())?,)* properties, _library: library })
                }
            }
        }
    };
}

functions! {
    hipRuntimeGetVersion(*mut c_int) -> c_int;
    hipInit(c_uint) -> c_int;
    hipGetDeviceCount(*mut c_int) -> c_int;
    hipSetDevice(c_int) -> c_int;
    hipDeviceGetAttribute(*mut c_int, c_int, c_int) -> c_int;
    hipGetErrorString(c_int) -> *const c_char;
    hipMemGetInfo(*mut usize, *mut usize) -> c_int;
    hipMalloc(*mut Ptr, usize) -> c_int;
    hipFree(Ptr) -> c_int;
    hipHostMalloc(*mut Ptr, usize, c_uint) -> c_int;
    hipHostFree(Ptr) -> c_int;
    hipMemcpyAsync(Ptr, *const c_void, usize, c_int, Ptr) -> c_int;
    hipMemcpy2DAsync(Ptr, usize, *const c_void, usize, usize, usize, c_int, Ptr) -> c_int;
    hipMemsetAsync(Ptr, c_int, usize, Ptr) -> c_int;
    hipModuleLoadData(*mut Ptr, *const c_void) -> c_int;
    hipModuleUnload(Ptr) -> c_int;
    hipModuleGetFunction(*mut Ptr, Ptr, *const c_char) -> c_int;
    hipModuleLaunchKernel(Ptr, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Ptr, *mut Ptr, *mut Ptr) -> c_int;
    hipStreamCreateWithFlags(*mut Ptr, c_uint) -> c_int;
    hipStreamDestroy(Ptr) -> c_int;
    hipStreamSynchronize(Ptr) -> c_int;
    hipStreamQuery(Ptr) -> c_int;
    hipStreamBeginCapture(Ptr, c_int) -> c_int;
    hipStreamEndCapture(Ptr, *mut Ptr) -> c_int;
    hipEventCreateWithFlags(*mut Ptr, c_uint) -> c_int;
    hipEventDestroy(Ptr) -> c_int;
    hipEventRecord(Ptr, Ptr) -> c_int;
    hipEventSynchronize(Ptr) -> c_int;
    hipGraphInstantiate(*mut Ptr, Ptr, *mut Ptr, *mut c_char, usize) -> c_int;
    hipGraphLaunch(Ptr, Ptr) -> c_int;
    hipGraphDestroy(Ptr) -> c_int;
    hipGraphExecDestroy(Ptr) -> c_int;
}

fn unusable(why: String) -> DriverError {
    DriverError::Unusable { why }
}

impl Functions {
    fn load() -> Result<Arc<Self>, DriverError> {
        // SAFETY: the initialisers of AMD's runtime run, as in every program that uses it.
        let library = LIBRARIES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        let library = library.ok_or_else(|| {
            unusable("libamdhip64.so is not there: it comes with ROCm, of version 6.0 or newer".into())
        })?;
        let functions = Self::find(library)
            .map_err(|error| unusable(format!("libamdhip64.so is not of HIP 6 or 7: {error}")))?;
        let mut version = 0;
        // SAFETY: writes one number.
        functions
            .check("hipRuntimeGetVersion", unsafe { (functions.hipRuntimeGetVersion)(&raw mut version) })?;
        check_version(version)?;
        Ok(Arc::new(functions))
    }

    fn words(&self, code: c_int) -> String {
        // SAFETY: gives the address of a constant for every code.
        let at = unsafe { (self.hipGetErrorString)(code) };
        if at.is_null() {
            return format!("error {code}");
        }
        // SAFETY: a constant that ends with a zero.
        format!("error {code}: {}", unsafe { CStr::from_ptr(at) }.to_string_lossy())
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), DriverError> {
        if code == 0 { Ok(()) } else { Err(DriverError::Call { call, why: self.words(code) }) }
    }

    fn count(&self) -> Result<usize, DriverError> {
        // SAFETY: may be called any number of times.
        match unsafe { (self.hipInit)(0) } {
            NO_DEVICE => return Ok(0),
            code => self.check("hipInit", code)?,
        }
        let mut count = 0;
        // SAFETY: writes one number.
        match unsafe { (self.hipGetDeviceCount)(&raw mut count) } {
            NO_DEVICE => Ok(0),
            code => self.check("hipGetDeviceCount", code).map(|()| count as usize),
        }
    }

    /// The device's name and architecture. The structure's layout differs between versions, its beginning does not: the name, in
    /// 256 bytes. The architecture is the only other text in it that begins with `gfx`.
    fn name_and_arch(&self, ordinal: c_int) -> Result<(String, String), DriverError> {
        let mut properties = vec![0_u64; PROPERTIES_BYTES / 8];
        // SAFETY: more room than the structure takes.
        let code = unsafe { (self.properties)(properties.as_mut_ptr().cast(), ordinal) };
        self.check("hipGetDeviceProperties", code)?;
        let bytes: Vec<u8> = properties.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let (name, rest) = bytes.split_at(256);
        let name = text_of(name);
        let arch = rest.windows(3).position(|three| three == b"gfx").map(|at| text_of(&rest[at..]));
        // With its features behind a colon.
        let arch = arch.and_then(|arch| arch.split(':').next().map(String::from));
        let arch =
            arch.ok_or_else(|| unusable(format!("HIP does not say what architecture {name} is of")))?;
        Ok((name, arch))
    }
}

fn text_of(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn check_version(found: c_int) -> Result<(), DriverError> {
    if found >= NEEDED_VERSION {
        return Ok(());
    }
    let (major, minor) = (found / 10_000_000, found / 100_000 % 100);
    Err(unusable(format!(
        "the HIP runtime here is {major}.{minor}, and 6.0 is needed: install ROCm 6.0 or newer"
    )))
}

/// Whether there are code objects for an architecture.
fn check_arch(name: &str, arch: &str, compiled: &[&str]) -> Result<(), DriverError> {
    if compiled.contains(&arch) {
        return Ok(());
    }
    Err(unusable(format!(
        "{name} is of architecture {arch}, and the kernels were compiled for {} only",
        compiled.join(" and ")
    )))
}

/// Architectures that there are code objects for.
fn compiled() -> Vec<&'static str> {
    let mut archs: Vec<_> = kernels::HIP_IMAGES.iter().map(|image| image.arch).collect();
    archs.sort_unstable();
    archs.dedup();
    archs
}

/// Loads the library; how many devices there are.
pub(crate) fn count() -> Result<usize, DriverError> {
    Functions::load()?.count()
}

/// Opens a device and loads the kernels.
pub(crate) fn open(ordinal: usize) -> Result<Device<Hip>, DriverError> {
    let functions = Functions::load()?;
    let count = functions.count()?;
    if ordinal >= count {
        let why =
            format!("there is no ROCm device {ordinal}: HIP shows {count} (HIP_VISIBLE_DEVICES limits them)");
        return Err(unusable(why));
    }
    let device = ordinal as c_int;
    let (name, arch) = functions.name_and_arch(device)?;
    check_arch(&name, &arch, &compiled())?;
    let attribute = |attribute| {
        let mut value = 0;
        // SAFETY: writes one number.
        let code = unsafe { (functions.hipDeviceGetAttribute)(&raw mut value, attribute, device) };
        functions.check("hipDeviceGetAttribute", code).map(|()| value)
    };
    let (processors, shared) =
        (attribute(ATTRIBUTE_MULTIPROCESSOR_COUNT)?, attribute(ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK)?);
    let mut api = Hip { functions, device, modules: Vec::new() };
    api.enter()?;
    let (free_bytes, total_bytes) = api.memory()?;
    let mut table = Vec::new();
    for image in kernels::HIP_IMAGES.iter().filter(|image| image.arch == arch) {
        api.load(image, &mut table)?;
    }
    let info = DeviceInfo {
        driver: "rocm",
        name,
        warp_size: WAVE,
        num_multiprocessors: processors as u32,
        max_shared_bytes: shared as usize,
        total_bytes,
        free_bytes,
        fp8: arch == "gfx942",
        fnuz: arch == "gfx942",
        arch,
    };
    Device::new(api, info, table, &kernels::emulated())
}

/// One device.
pub(crate) struct Hip {
    functions: Arc<Functions>,
    device: c_int,
    modules: Vec<Ptr>,
}

// SAFETY: modules may be used from any thread; each call makes the device current first.
unsafe impl Send for Hip {}
// SAFETY: as above.
unsafe impl Sync for Hip {}

impl Hip {
    fn check(&self, call: &'static str, code: c_int) -> Result<(), DriverError> {
        self.functions.check(call, code)
    }

    fn check_kernel(&self, kernel: &str, code: c_int) -> Result<(), DriverError> {
        if code == 0 {
            Ok(())
        } else {
            Err(DriverError::Kernel { kernel: kernel.into(), why: self.functions.words(code) })
        }
    }

    /// Free memory, and all of it.
    fn memory(&self) -> Result<(usize, usize), DriverError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        self.check("hipMemGetInfo", unsafe {
            (self.functions.hipMemGetInfo)(&raw mut free, &raw mut total)
        })?;
        Ok((free, total))
    }

    /// Loads a file's kernels.
    fn load(&mut self, image: &Image, table: &mut Vec<(&'static str, Handle)>) -> Result<(), DriverError> {
        let mut module = ptr::null_mut();
        // SAFETY: a whole image, as the compiler wrote it.
        let code =
            unsafe { (self.functions.hipModuleLoadData)(&raw mut module, image.bytes.0.as_ptr().cast()) };
        self.check_kernel(image.file, code)?;
        self.modules.push(module);
        for &kernel in image.kernels {
            let mut function = ptr::null_mut();
            let symbol = CString::new(kernel).expect("a kernel's name has no zero");
            // SAFETY: writes one handle, which lives as long as the module.
            let code =
                unsafe { (self.functions.hipModuleGetFunction)(&raw mut function, module, symbol.as_ptr()) };
            self.check_kernel(kernel, code)?;
            table.push((kernel, Handle(function)));
        }
        Ok(())
    }
}

impl Drop for Hip {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            for &module in &self.modules {
                // SAFETY: loaded once, and nothing of it runs any more.
                unsafe { (self.functions.hipModuleUnload)(module) };
            }
        }
    }
}

impl Api for Hip {
    const BLOCKING_VARIABLE: &'static str = "AMD_SERIALIZE_KERNEL=3 HIP_LAUNCH_BLOCKING";

    fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: a device that is there.
        self.check("hipSetDevice", unsafe { (self.functions.hipSetDevice)(self.device) })
    }

    fn reserve(&self, size_bytes: usize) -> Result<DevicePtr, DriverError> {
        let mut at = ptr::null_mut();
        // SAFETY: writes one address.
        match unsafe { (self.functions.hipMalloc)(&raw mut at, size_bytes) } {
            OUT_OF_MEMORY => {
                let (free_bytes, total_bytes) = self.memory()?;
                Err(DriverError::OutOfMemory { requested_bytes: size_bytes, free_bytes, total_bytes })
            }
            code => self.check("hipMalloc", code).map(|()| DevicePtr(at as u64)),
        }
    }

    fn release(&self, at: DevicePtr) {
        // SAFETY: from `reserve`, and given back once.
        unsafe { (self.functions.hipFree)(at.0 as Ptr) };
    }

    fn reserve_pinned(&self, size_bytes: usize) -> Result<*mut u8, DriverError> {
        let mut at = ptr::null_mut();
        // SAFETY: writes one address.
        self.check("hipHostMalloc", unsafe { (self.functions.hipHostMalloc)(&raw mut at, size_bytes, 0) })?;
        Ok(at.cast())
    }

    unsafe fn release_pinned(&self, at: *mut u8) {
        // SAFETY: from `reserve_pinned`, as the caller promises.
        unsafe { (self.functions.hipHostFree)(at.cast()) };
    }

    fn stream(&self) -> Result<Handle, DriverError> {
        let mut stream = ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (self.functions.hipStreamCreateWithFlags)(&raw mut stream, STREAM_NON_BLOCKING) };
        self.check("hipStreamCreate", code).map(|()| Handle(stream))
    }

    fn release_stream(&self, stream: Handle) {
        // SAFETY: from `stream`, and given back once.
        unsafe { (self.functions.hipStreamDestroy)(stream.0) };
    }

    fn synchronize(&self, stream: Handle) -> Result<(), DriverError> {
        // SAFETY: a stream of this device.
        self.check("hipStreamSynchronize", unsafe { (self.functions.hipStreamSynchronize)(stream.0) })
    }

    unsafe fn copy_in(&self, from: *const u8, to: Rows, stream: Handle) -> Result<(), DriverError> {
        let (dst, src, width) = (to.at.0 as Ptr, from.cast(), to.width_bytes);
        if to.num_rows == 1 {
            // SAFETY: the caller promises the host's bytes; the device's lie in its memory.
            let code = unsafe { (self.functions.hipMemcpyAsync)(dst, src, width, HOST_TO_DEVICE, stream.0) };
            return self.check("hipMemcpyAsync", code);
        }
        let copy = self.functions.hipMemcpy2DAsync;
        // SAFETY: as above, row by row.
        let code =
            unsafe { copy(dst, to.pitch_bytes, src, width, width, to.num_rows, HOST_TO_DEVICE, stream.0) };
        self.check("hipMemcpy2DAsync", code)
    }

    unsafe fn copy_out(&self, from: Rows, to: *mut u8, stream: Handle) -> Result<(), DriverError> {
        let (dst, src, width) = (to.cast(), from.at.0 as *const c_void, from.width_bytes);
        if from.num_rows == 1 {
            // SAFETY: the caller promises the host's bytes; the device's lie in its memory.
            let code = unsafe { (self.functions.hipMemcpyAsync)(dst, src, width, DEVICE_TO_HOST, stream.0) };
            return self.check("hipMemcpyAsync", code);
        }
        let copy = self.functions.hipMemcpy2DAsync;
        // SAFETY: as above, row by row.
        let code = unsafe {
            copy(dst, width, src, from.pitch_bytes, width, from.num_rows, DEVICE_TO_HOST, stream.0)
        };
        self.check("hipMemcpy2DAsync", code)
    }

    fn copy(
        &self,
        from: DevicePtr,
        to: DevicePtr,
        size_bytes: usize,
        stream: Handle,
    ) -> Result<(), DriverError> {
        let (dst, src) = (to.0 as Ptr, from.0 as *const c_void);
        // SAFETY: bytes of the device's memory.
        let code =
            unsafe { (self.functions.hipMemcpyAsync)(dst, src, size_bytes, DEVICE_TO_DEVICE, stream.0) };
        self.check("hipMemcpyAsync", code)
    }

    fn fill(&self, at: DevicePtr, size_bytes: usize, byte: u8, stream: Handle) -> Result<(), DriverError> {
        // SAFETY: bytes of the device's memory.
        let code =
            unsafe { (self.functions.hipMemsetAsync)(at.0 as Ptr, c_int::from(byte), size_bytes, stream.0) };
        self.check("hipMemsetAsync", code)
    }

    unsafe fn launch(
        &self,
        function: Handle,
        threads: u32,
        launch: &Launch<'_>,
        stream: Handle,
    ) -> Result<(), DriverError> {
        let [x, y, z] = launch.grid;
        let (mut params, shared) = (params(launch.args), launch.shared_bytes as c_uint);
        let run = self.functions.hipModuleLaunchKernel;
        // SAFETY: the function's one argument, as the caller promises; the runtime copies it before it returns.
        let code = unsafe {
            run(function.0, x, y, z, threads, 1, 1, shared, stream.0, params.as_mut_ptr(), ptr::null_mut())
        };
        self.check_kernel(launch.kernel, code)
    }

    fn event(&self) -> Result<Handle, DriverError> {
        let mut event = ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (self.functions.hipEventCreateWithFlags)(&raw mut event, EVENT_DISABLE_TIMING) };
        self.check("hipEventCreate", code).map(|()| Handle(event))
    }

    fn release_event(&self, event: Handle) {
        // SAFETY: from `event`, and given back once.
        unsafe { (self.functions.hipEventDestroy)(event.0) };
    }

    fn record(&self, event: Handle, stream: Handle) -> Result<(), DriverError> {
        // SAFETY: an event and a stream of this device.
        self.check("hipEventRecord", unsafe { (self.functions.hipEventRecord)(event.0, stream.0) })
    }

    fn wait(&self, event: Handle) -> Result<(), DriverError> {
        // SAFETY: an event of this device.
        self.check("hipEventSynchronize", unsafe { (self.functions.hipEventSynchronize)(event.0) })
    }

    fn begin_capture(&self, stream: Handle) -> Result<(), DriverError> {
        // SAFETY: a stream of this device.
        let code = unsafe { (self.functions.hipStreamBeginCapture)(stream.0, CAPTURE_THREAD_LOCAL) };
        self.check("hipStreamBeginCapture", code)
    }

    fn end_capture(&self, stream: Handle) -> Result<Handle, DriverError> {
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: writes one handle, which is given back below.
        self.check("hipStreamEndCapture", unsafe {
            (self.functions.hipStreamEndCapture)(stream.0, &raw mut graph)
        })?;
        let instantiate = self.functions.hipGraphInstantiate;
        // SAFETY: a whole graph; writes one handle, and no log.
        let made = unsafe { instantiate(&raw mut exec, graph, ptr::null_mut(), ptr::null_mut(), 0) };
        // SAFETY: what was made of it does not need it.
        unsafe { (self.functions.hipGraphDestroy)(graph) };
        self.check("hipGraphInstantiate", made).map(|()| Handle(exec))
    }

    fn replay(&self, graph: Handle, stream: Handle) -> Result<(), DriverError> {
        // SAFETY: a graph of this device; what its launches point to lives as long as the arena.
        self.check("hipGraphLaunch", unsafe { (self.functions.hipGraphLaunch)(graph.0, stream.0) })
    }

    fn release_graph(&self, graph: Handle) {
        // SAFETY: from `end_capture`, and given back once.
        unsafe { (self.functions.hipGraphExecDestroy)(graph.0) };
    }
}

impl Connected for Hip {
    const LIBRARIES: &'static [&'static str] = &["librccl.so.1", "librccl.so", "/opt/rocm/lib/librccl.so"];
    const SOURCE: &'static str = "it comes with ROCm as the package rccl";

    fn is_idle(&self, stream: Handle) -> bool {
        // SAFETY: a stream of this device.
        unsafe { (self.functions.hipStreamQuery)(stream.0) != NOT_READY }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_runtime_is_refused_with_both_versions() {
        check_version(60_342_133).expect("HIP 6.3");
        let error = check_version(50_731_921).expect_err("older").to_string();
        assert!(error.contains("5.7") && error.contains("6.0"), "{error}");
    }

    #[test]
    fn there_is_code_for_two_architectures() {
        assert_eq!(compiled(), ["gfx90a", "gfx942"]);
        check_arch("MI300X", "gfx942", &compiled()).expect("a code object");
        let error = check_arch("Radeon", "gfx1100", &compiled()).expect_err("none").to_string();
        assert!(
            error.contains("Radeon") && error.contains("gfx1100") && error.contains("gfx90a and gfx942"),
            "{error}"
        );
    }

    /// On a machine with a GPU it opens; on any other it says why not. It never panics.
    #[test]
    fn without_a_driver_there_is_a_sentence() {
        match (count(), open(1000)) {
            (Ok(count), Err(error)) => {
                assert!(error.to_string().contains(&format!("shows {count}")), "{error}")
            }
            (Err(counted), Err(opened)) => {
                assert_eq!(counted, opened);
                assert!(
                    matches!(opened, DriverError::Unusable { .. } | DriverError::Call { .. }),
                    "{opened}"
                );
            }
            (_, Ok(_)) => panic!("there are no thousand devices"),
        }
    }
}
