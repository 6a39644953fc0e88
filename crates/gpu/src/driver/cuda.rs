//! NVIDIA's GPUs through libcuda, which is looked for at run time: a program with this feature starts without it. Knows no
//! operation.

use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::ptr;

use cudarc::driver::sys::{self, CUresult};

use super::device::{Api, Device, Handle, params};
use super::nccl::Connected;
use super::{DeviceInfo, DevicePtr, DriverError, Launch, Rows};
use crate::kernels::{self, Image};

/// As `cuDriverGetVersion` counts. The kernels are compiled by CUDA 13.0.
const NEEDED_VERSION: c_int = 13_000;

fn unusable(why: String) -> DriverError {
    DriverError::Unusable { why }
}

/// The driver's words for a failure.
fn words(result: CUresult) -> String {
    let text = |of: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut at = ptr::null();
        // SAFETY: gives the address of a constant, or none for a code that the driver does not know.
        let known = unsafe { of(result, &raw mut at) } == CUresult::CUDA_SUCCESS && !at.is_null();
        // SAFETY: a constant that ends with a zero.
        known.then(|| unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned())
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("error {}", result as u32));
    text(sys::cuGetErrorString).map_or(name.clone(), |sentence| format!("{name}: {sentence}"))
}

fn check(call: &'static str, result: CUresult) -> Result<(), DriverError> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        failure => Err(DriverError::Call { call, why: words(failure) }),
    }
}

fn check_version(found: c_int) -> Result<(), DriverError> {
    if found >= NEEDED_VERSION {
        return Ok(());
    }
    Err(unusable(format!(
        "NVIDIA's driver here is of CUDA {}.{}, and CUDA 13.0 is needed: install a driver of series 580 or newer",
        found / 1000,
        found % 1000 / 10
    )))
}

/// Whether the kernels have code for a GPU of that compute capability.
fn check_arch(name: &str, (major, minor): (c_int, c_int), allow_ptx: bool) -> Result<(), DriverError> {
    let is_native = major == 8 || (major, minor) == (9, 0);
    if is_native || (major > 8 && allow_ptx) {
        return Ok(());
    }
    let arch = format!("{name} has compute capability {major}.{minor}");
    Err(unusable(if major < 8 {
        format!("{arch}, and the kernels need 8.0 or higher")
    } else {
        format!(
            "{arch}, and the kernels were compiled for 8.x and 9.0 only: --allow-ptx has the driver compile them when the \
             server starts, which takes a while and gives slower code"
        )
    }))
}

/// Loads the library; how many devices there are.
pub(crate) fn count() -> Result<usize, DriverError> {
    // SAFETY: loads the library and looks no further.
    if !unsafe { sys::is_culib_present() } {
        return Err(unusable(
            "libcuda.so.1 is not there: it comes with NVIDIA's driver, of series 580 or newer".into(),
        ));
    }
    let mut version = 0;
    // SAFETY: writes one number; may be called before `cuInit`.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    check_version(version)?;
    // SAFETY: may be called any number of times.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
        result => check("cuInit", result)?,
    }
    let mut count = 0;
    // SAFETY: writes one number.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    Ok(count as usize)
}

/// Opens a device and loads the kernels.
pub(crate) fn open(ordinal: usize, allow_ptx: bool) -> Result<Device<Cuda>, DriverError> {
    let count = count()?;
    if ordinal >= count {
        let why = format!(
            "there is no CUDA device {ordinal}: NVIDIA's driver shows {count} (CUDA_VISIBLE_DEVICES limits them)"
        );
        return Err(unusable(why));
    }
    let mut device = 0;
    // SAFETY: writes one number.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, ordinal as c_int) })?;
    let name = name(device)?;
    let attribute = |attribute| {
        let mut value = 0;
        // SAFETY: writes one number.
        check("cuDeviceGetAttribute", unsafe {
            sys::cuDeviceGetAttribute(&raw mut value, attribute, device)
        })?;
        Ok::<_, DriverError>(value)
    };
    use sys::CUdevice_attribute as Attribute;
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    check_arch(&name, (major, minor), allow_ptx)?;
    let max_shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    let mut api = Cuda::new(device)?;
    let (mut free_bytes, mut total_bytes) = (0, 0);
    // SAFETY: writes two numbers.
    check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free_bytes, &raw mut total_bytes) })?;
    let info = DeviceInfo {
        driver: "cuda",
        name,
        arch: format!("sm_{major}{minor}"),
        warp_size: attribute(Attribute::CU_DEVICE_ATTRIBUTE_WARP_SIZE)? as u32,
        num_multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        max_shared_bytes: max_shared as usize,
        total_bytes,
        free_bytes,
        // What runs from PTX was compiled for 8.0, which has no FP8 instructions.
        fp8: (major, minor) == (9, 0),
        fnuz: false,
    };
    let mut functions = Vec::new();
    for image in kernels::CUDA_IMAGES {
        api.load(image, max_shared, &mut functions)?;
    }
    Device::new(api, info, functions, &kernels::emulated())
}

fn name(device: sys::CUdevice) -> Result<String, DriverError> {
    let mut name = [0 as c_char; 256];
    // SAFETY: at most as many bytes as there are, with a zero at the end.
    check("cuDeviceGetName", unsafe {
        sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device)
    })?;
    // SAFETY: as above.
    Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
}

/// One device with its primary context, which collectives use too.
pub(crate) struct Cuda {
    device: sys::CUdevice,
    context: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
}

// SAFETY: contexts and modules may be used from any thread; each call makes the context current first.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

impl Cuda {
    fn new(device: sys::CUdevice) -> Result<Self, DriverError> {
        let mut context = ptr::null_mut();
        // SAFETY: writes one handle; given back in `drop`.
        let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) };
        check("cuDevicePrimaryCtxRetain", retained)?;
        let api = Self { device, context, modules: Vec::new() };
        api.enter()?;
        Ok(api)
    }

    /// Loads a file's kernels.
    fn load(
        &mut self,
        image: &Image,
        max_shared: c_int,
        functions: &mut Vec<(&'static str, Handle)>,
    ) -> Result<(), DriverError> {
        let failed = |kernel: &str, result: CUresult| match result {
            CUresult::CUDA_SUCCESS => Ok(()),
            failure => Err(DriverError::Kernel { kernel: kernel.into(), why: words(failure) }),
        };
        let mut module = ptr::null_mut();
        // SAFETY: a whole image, as the compiler wrote it.
        failed(image.file, unsafe { sys::cuModuleLoadData(&raw mut module, image.bytes.0.as_ptr().cast()) })?;
        self.modules.push(module);
        for &kernel in image.kernels {
            let mut function = ptr::null_mut();
            let symbol = CString::new(kernel).expect("a kernel's name has no zero");
            // SAFETY: writes one handle, which lives as long as the module.
            failed(kernel, unsafe { sys::cuModuleGetFunction(&raw mut function, module, symbol.as_ptr()) })?;
            // A launch may ask for all that a block can have, beyond the 48 KiB that need no asking.
            let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a limit of this function.
            failed(kernel, unsafe { sys::cuFuncSetAttribute(function, limit, max_shared) })?;
            functions.push((kernel, Handle(function.cast())));
        }
        Ok(())
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            for &module in &self.modules {
                // SAFETY: loaded once, and nothing of it runs any more.
                unsafe { sys::cuModuleUnload(module) };
            }
        }
        // SAFETY: retained once.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A copy between dense host memory and rows of the device, of which the caller sets its own side.
fn rows_copy(rows: Rows) -> sys::CUDA_MEMCPY2D {
    sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
        srcHost: ptr::null(),
        srcDevice: 0,
        srcArray: ptr::null_mut(),
        srcPitch: 0,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
        dstHost: ptr::null_mut(),
        dstDevice: 0,
        dstArray: ptr::null_mut(),
        dstPitch: 0,
        WidthInBytes: rows.width_bytes,
        Height: rows.num_rows,
    }
}

impl Api for Cuda {
    const BLOCKING_VARIABLE: &'static str = "CUDA_LAUNCH_BLOCKING";

    fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: a context that is retained.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    fn reserve(&self, size_bytes: usize) -> Result<DevicePtr, DriverError> {
        let mut at = 0;
        // SAFETY: writes one address.
        match unsafe { sys::cuMemAlloc_v2(&raw mut at, size_bytes) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (mut free_bytes, mut total_bytes) = (0, 0);
                // SAFETY: writes two numbers.
                check("cuMemGetInfo", unsafe {
                    sys::cuMemGetInfo_v2(&raw mut free_bytes, &raw mut total_bytes)
                })?;
                Err(DriverError::OutOfMemory { requested_bytes: size_bytes, free_bytes, total_bytes })
            }
            result => check("cuMemAlloc", result).map(|()| DevicePtr(at)),
        }
    }

    fn release(&self, at: DevicePtr) {
        // SAFETY: from `reserve`, and given back once.
        unsafe { sys::cuMemFree_v2(at.0) };
    }

    fn reserve_pinned(&self, size_bytes: usize) -> Result<*mut u8, DriverError> {
        let mut at = ptr::null_mut();
        // SAFETY: writes one address.
        check("cuMemAllocHost", unsafe { sys::cuMemAllocHost_v2(&raw mut at, size_bytes) })?;
        Ok(at.cast())
    }

    unsafe fn release_pinned(&self, at: *mut u8) {
        // SAFETY: from `reserve_pinned`, as the caller promises.
        unsafe { sys::cuMemFreeHost(at.cast()) };
    }

    fn stream(&self) -> Result<Handle, DriverError> {
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: writes one handle.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut stream, flags) })?;
        Ok(Handle(stream.cast()))
    }

    fn release_stream(&self, stream: Handle) {
        // SAFETY: from `stream`, and given back once.
        unsafe { sys::cuStreamDestroy_v2(stream.0.cast()) };
    }

    fn synchronize(&self, stream: Handle) -> Result<(), DriverError> {
        // SAFETY: a stream of this device.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream.0.cast()) })
    }

    unsafe fn copy_in(&self, from: *const u8, to: Rows, stream: Handle) -> Result<(), DriverError> {
        let stream = stream.0.cast();
        if to.num_rows == 1 {
            // SAFETY: the caller promises the host's bytes; the device's lie in its memory.
            let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to.at.0, from.cast(), to.width_bytes, stream) };
            return check("cuMemcpyHtoDAsync", copied);
        }
        let copy = sys::CUDA_MEMCPY2D {
            srcHost: from.cast(),
            srcPitch: to.width_bytes,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: to.at.0,
            dstPitch: to.pitch_bytes,
            ..rows_copy(to)
        };
        // SAFETY: as above, row by row.
        check("cuMemcpy2DAsync", unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, stream) })
    }

    unsafe fn copy_out(&self, from: Rows, to: *mut u8, stream: Handle) -> Result<(), DriverError> {
        let stream = stream.0.cast();
        if from.num_rows == 1 {
            // SAFETY: the caller promises the host's bytes; the device's lie in its memory.
            let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from.at.0, from.width_bytes, stream) };
            return check("cuMemcpyDtoHAsync", copied);
        }
        let copy = sys::CUDA_MEMCPY2D {
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcDevice: from.at.0,
            srcPitch: from.pitch_bytes,
            dstHost: to.cast(),
            dstPitch: from.width_bytes,
            ..rows_copy(from)
        };
        // SAFETY: as above, row by row.
        check("cuMemcpy2DAsync", unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, stream) })
    }

    fn copy(
        &self,
        from: DevicePtr,
        to: DevicePtr,
        size_bytes: usize,
        stream: Handle,
    ) -> Result<(), DriverError> {
        // SAFETY: bytes of the device's memory.
        let copied = unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, size_bytes, stream.0.cast()) };
        check("cuMemcpyDtoDAsync", copied)
    }

    fn fill(&self, at: DevicePtr, size_bytes: usize, byte: u8, stream: Handle) -> Result<(), DriverError> {
        // SAFETY: bytes of the device's memory.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(at.0, byte, size_bytes, stream.0.cast()) })
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
        let (function, stream) = (function.0.cast(), stream.0.cast());
        // SAFETY: the function's one argument, as the caller promises; the driver copies it before it returns.
        let launched = unsafe {
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                threads,
                1,
                1,
                shared,
                stream,
                params.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        match launched {
            CUresult::CUDA_SUCCESS => Ok(()),
            failure => Err(DriverError::Kernel { kernel: launch.kernel.into(), why: words(failure) }),
        }
    }

    fn event(&self) -> Result<Handle, DriverError> {
        let mut event = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: writes one handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
        Ok(Handle(event.cast()))
    }

    fn release_event(&self, event: Handle) {
        // SAFETY: from `event`, and given back once.
        unsafe { sys::cuEventDestroy_v2(event.0.cast()) };
    }

    fn record(&self, event: Handle, stream: Handle) -> Result<(), DriverError> {
        // SAFETY: an event and a stream of this device.
        check("cuEventRecord", unsafe { sys::cuEventRecord(event.0.cast(), stream.0.cast()) })
    }

    fn wait(&self, event: Handle) -> Result<(), DriverError> {
        // SAFETY: an event of this device.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(event.0.cast()) })
    }

    fn begin_capture(&self, stream: Handle) -> Result<(), DriverError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream of this device.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream.0.cast(), mode) })
    }

    fn end_capture(&self, stream: Handle) -> Result<Handle, DriverError> {
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: writes one handle, which is given back below.
        check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(stream.0.cast(), &raw mut graph) })?;
        // SAFETY: a whole graph; writes one handle.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0) };
        // SAFETY: what was made of it does not need it.
        unsafe { sys::cuGraphDestroy(graph) };
        check("cuGraphInstantiate", made)?;
        Ok(Handle(exec.cast()))
    }

    fn replay(&self, graph: Handle, stream: Handle) -> Result<(), DriverError> {
        // SAFETY: a graph of this device; what its launches point to lives as long as the arena.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.0.cast(), stream.0.cast()) })
    }

    fn release_graph(&self, graph: Handle) {
        // SAFETY: from `end_capture`, and given back once.
        unsafe { sys::cuGraphExecDestroy(graph.0.cast()) };
    }
}

impl Connected for Cuda {
    const LIBRARIES: &'static [&'static str] = &["libnccl.so.2", "libnccl.so"];
    const SOURCE: &'static str = "it comes as Debian's libnccl2 or the wheel nvidia-nccl-cu13, whose folder then belongs in LD_LIBRARY_PATH";

    fn is_idle(&self, stream: Handle) -> bool {
        // SAFETY: a stream of this device.
        let state = unsafe { sys::cuStreamQuery(stream.0.cast()) };
        state != CUresult::CUDA_ERROR_NOT_READY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_driver_is_refused_with_both_versions() {
        check_version(13_000).expect("CUDA 13.0");
        check_version(14_010).expect("newer");
        let error = check_version(12_080).expect_err("older").to_string();
        assert!(
            error.contains("CUDA 12.8") && error.contains("CUDA 13.0") && error.contains("580"),
            "{error}"
        );
    }

    #[test]
    fn only_gpus_with_native_code_are_taken_unless_ptx_is_allowed() {
        for (native, capability) in [("A100", (8, 0)), ("L40S", (8, 9)), ("H200", (9, 0))] {
            check_arch(native, capability, false).expect("native code");
        }
        let error = check_arch("B200", (10, 0), false).expect_err("no native code").to_string();
        assert!(error.contains("B200") && error.contains("10.0") && error.contains("--allow-ptx"), "{error}");
        check_arch("B200", (10, 0), true).expect("PTX");
        for allow_ptx in [false, true] {
            let error = check_arch("V100", (7, 0), allow_ptx).expect_err("too old").to_string();
            assert!(
                error.contains("V100") && error.contains("8.0") && !error.contains("--allow-ptx"),
                "{error}"
            );
        }
    }

    /// On a machine with a GPU it opens; on any other it says why not. It never panics.
    #[test]
    fn without_a_driver_there_is_a_sentence() {
        match (count(), open(1000, false)) {
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
