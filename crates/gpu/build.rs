//! Compiles the kernels: for the host always (the emulator), for GPUs where the features `cuda` and `rocm` ask for it.

#[path = "build/device.rs"]
mod device;

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("../../kernels");
    println!("cargo::rerun-if-changed={}", kernels.display());
    let sources = sources(&kernels);
    emulator(&kernels, &sources);
    let names = sources.iter().flat_map(|source| names(source)).collect::<Vec<_>>();
    let out = PathBuf::from(env::var("OUT_DIR").expect("set by cargo"));
    let mut text = table(&names);
    if has_feature("CUDA") {
        text += &embed("CUDA_IMAGES", &device::cuda(&kernels, &sources, &out));
    }
    if has_feature("ROCM") {
        text += &embed("HIP_IMAGES", &device::rocm(&kernels, &sources, &out));
    }
    fs::write(out.join("kernels.rs"), text).expect("OUT_DIR is writable");
}

fn has_feature(name: &str) -> bool {
    env::var_os(format!("CARGO_FEATURE_{name}")).is_some()
}

/// A constant with the bytes of compiled images.
fn embed(constant: &str, images: &[device::Image]) -> String {
    let mut text = format!("/// Compiled kernel files.\npub(crate) static {constant}: &[Image] = &[\n");
    for image in images {
        let names = names(&image.source);
        let file = image.source.file_name().and_then(|name| name.to_str()).expect("a kernel file's name");
        writeln!(
            text,
            "    Image {{ file: {file:?}, arch: {:?}, kernels: &{names:?}, bytes: &Aligned(*include_bytes!({:?})) }},",
            image.arch,
            image.path.display().to_string()
        )
        .expect("a string takes all");
    }
    text + "];\n"
}

/// The kernel files, in order.
fn sources(kernels: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(kernels).expect("the folder of kernels");
    let mut sources: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    sources
}

/// Names of a file's kernels: what stands behind `R1_KERNEL(` at the beginning of a line.
fn names(source: &Path) -> Vec<String> {
    let text = fs::read_to_string(source).expect("a kernel file");
    let kernels = text.lines().filter_map(|line| line.strip_prefix("R1_KERNEL("));
    kernels.filter_map(|rest| Some(rest.split_once(',')?.0.trim().to_owned())).collect()
}

fn emulator(kernels: &Path, sources: &[PathBuf]) {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").include(kernels).warnings(true).extra_warnings(true);
    // A block's threads are interpreted one by one: without optimisation the tests take minutes.
    build.opt_level(3).flag_if_supported("-fno-math-errno");
    build.file(kernels.join("common/emu.cpp"));
    for source in sources {
        build.file(source);
    }
    // `.cu` means CUDA to clang; here it is C++.
    build.flag("-xc++");
    build.compile("r1_emu_kernels");
}

/// The Rust side of the kernels: their names, and the emulator's entry points.
fn table(names: &[String]) -> String {
    let mut text = String::new();
    let mut say = |line: String| writeln!(text, "{line}").expect("a string takes all");
    say("// SAFETY: as `R1_KERNEL` in kernels/common/gpu.cuh defines them.".into());
    say("unsafe extern \"C\" {".into());
    for name in names {
        say(format!("    fn r1_emu_kernel_{name}(args: *const std::ffi::c_void);"));
        say(format!("    static r1_emu_args_bytes_{name}: u32;"));
        say(format!("    static r1_emu_max_warps_{name}: u32;"));
    }
    say("}".into());
    say("/// The emulator's entry points, one per name.".into());
    say("pub(crate) fn emulated() -> Vec<EmulatedKernel> {".into());
    say("    vec![".into());
    for name in names {
        say("        // SAFETY: constants, written by the C++ compiler.".into());
        say(format!(
            "        EmulatedKernel {{ name: {name:?}, entry: r1_emu_kernel_{name}, args_bytes: unsafe {{ r1_emu_args_bytes_{name} }} as usize, \
             max_warps: unsafe {{ r1_emu_max_warps_{name} }} }},"
        ));
    }
    say("    ]".into());
    say("}".into());
    text
}
