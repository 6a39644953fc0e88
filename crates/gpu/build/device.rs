//! Compiles the kernels for NVIDIA's and AMD's GPUs, ahead of time: a fatbin or code object per file, which is compiled again only
//! when something that goes into it has changed. The flags stand in `kernels/*.flags`. Knows no kernel.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::hash::{Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

/// The way out of every trouble with a compiler.
const HINT: &str = "tools/gpu/toolchain.sh installs the compilers and prints the environment to use; \
                    without the features `cuda` and `rocm` none is needed";
/// The CUDA release that is compiled with: a driver of series 580 takes no newer PTX.
const CUDA_RELEASE: &str = "release 13.0";
/// Compilers at a time: each takes up to 2 GiB.
const JOBS: usize = 2;

/// One image to be made.
struct Job<'a> {
    source: &'a Path,
    compiler: &'a Path,
    args: Vec<String>,
    output: PathBuf,
}

/// A compiled image of a kernel file.
pub(crate) struct Image {
    pub(crate) source: PathBuf,
    /// `gfx942`; `fatbin` where it holds several.
    pub(crate) arch: String,
    pub(crate) path: PathBuf,
}

/// A fatbin per file.
pub(crate) fn cuda(kernels: &Path, sources: &[PathBuf], out: &Path) -> Vec<Image> {
    let nvcc = nvcc();
    let version = Command::new(&nvcc).arg("--version").output();
    let version = version.unwrap_or_else(|error| fail(&format!("{} does not run: {error}", nvcc.display())));
    let words = String::from_utf8_lossy(&version.stdout);
    if !words.contains(CUDA_RELEASE) {
        let found = words.lines().find(|line| line.contains("release")).unwrap_or("no version");
        fail(&format!("{} is not of CUDA {CUDA_RELEASE}: {found}", nvcc.display()));
    }
    let mut args = flags(&kernels.join("nvcc.flags"));
    args.insert(0, "-fatbin".into());
    let images = images(sources, "fatbin", out);
    compile(kernels, sources, &nvcc, &[args], &images);
    images
}

/// A code object per file and architecture.
pub(crate) fn rocm(kernels: &Path, sources: &[PathBuf], out: &Path) -> Vec<Image> {
    println!("cargo::rerun-if-env-changed=R1_HIP_CLANG");
    let clang =
        env::var_os("R1_HIP_CLANG").map_or_else(|| on_path("clang++-19"), |path| Some(PathBuf::from(path)));
    let clang = clang.unwrap_or_else(|| {
        fail("the feature `rocm` needs clang++-19, which is not in PATH (or R1_HIP_CLANG)")
    });
    let mut args = flags(&kernels.join("hip.flags"));
    let archs: Vec<String> =
        args.iter().filter_map(|flag| flag.strip_prefix("--offload-arch=")).map(String::from).collect();
    args.retain(|flag| !flag.starts_with("--offload-arch="));
    args.push("-c".into());
    let mut all = Vec::new();
    let mut per_arch = Vec::new();
    for arch in archs {
        all.extend(images(sources, &arch, out));
        per_arch.push(args.iter().cloned().chain([format!("--offload-arch={arch}")]).collect());
    }
    compile(kernels, sources, &clang, &per_arch, &all);
    all
}

fn images(sources: &[PathBuf], arch: &str, out: &Path) -> Vec<Image> {
    let image = |source: &PathBuf| {
        let file = source.file_stem().and_then(OsStr::to_str).expect("a kernel file's name");
        let path = out.join(format!("{file}.{arch}"));
        Image { source: source.clone(), arch: arch.to_owned(), path }
    };
    sources.iter().map(image).collect()
}

/// Compiles all sources with each list of arguments in turn.
fn compile(kernels: &Path, sources: &[PathBuf], compiler: &Path, args: &[Vec<String>], images: &[Image]) {
    let common = inputs_of(&kernels.join("common"));
    let jobs =
        images.iter().zip(args.iter().flat_map(|args| sources.iter().map(move |source| (args, source))));
    let jobs: Vec<_> = jobs
        .map(|(image, (args, source))| {
            let (include, output) = (format!("-I{}", kernels.display()), image.path.clone());
            let ends = [include, "-o".into(), output.display().to_string(), source.display().to_string()];
            Job { source, compiler, args: args.iter().cloned().chain(ends).collect(), output }
        })
        .collect();
    let next = Mutex::new(jobs.iter());
    let troubles = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..JOBS.min(jobs.len()) {
            scope.spawn(|| {
                loop {
                    let job = next.lock().expect("no job panics").next();
                    let Some(job) = job else { return };
                    if let Err(trouble) = run(job, &common) {
                        troubles.lock().expect("no job panics").push(trouble);
                    }
                }
            });
        }
    });
    let troubles = troubles.into_inner().expect("no job panics");
    if !troubles.is_empty() {
        fail(&troubles.join("\n"));
    }
}

/// Runs a compiler unless its output is already that of the same inputs.
fn run(job: &Job<'_>, common: &[Vec<u8>]) -> Result<(), String> {
    let source = fs::read(job.source).map_err(|error| format!("{}: {error}", job.source.display()))?;
    let mut hasher = DefaultHasher::new();
    (source, common, &job.args, job.compiler).hash(&mut hasher);
    let inputs = format!("{:016x}", hasher.finish());
    let stamp = job.output.with_added_extension("inputs");
    if job.output.exists() && fs::read_to_string(&stamp).is_ok_and(|found| found == inputs) {
        return Ok(());
    }
    let name = job.compiler.display();
    let done = Command::new(job.compiler)
        .args(&job.args)
        .output()
        .map_err(|error| format!("{name} does not run: {error}"))?;
    if !done.status.success() {
        let words = String::from_utf8_lossy(&done.stderr);
        return Err(format!("{name} {}: {}\n{words}", job.args.join(" "), done.status));
    }
    fs::write(&stamp, inputs).map_err(|error| format!("{}: {error}", stamp.display()))
}

/// What every kernel file includes.
fn inputs_of(folder: &Path) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(folder).expect("the kernels' common folder");
    let mut paths: Vec<_> =
        entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("a file of the kernels")).collect()
}

/// A flag per line; `#` begins a comment.
fn flags(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_else(|error| fail(&format!("{}: {error}", path.display())));
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(String::from)
        .collect()
}

/// The compiler of `R1_CUDA_HOME`, else the one that tools/gpu/toolchain.sh installed, else that of a CUDA installation.
fn nvcc() -> PathBuf {
    for variable in ["R1_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let at = |home: PathBuf| home.join("bin/nvcc");
    if let Some(home) = env::var_os("R1_CUDA_HOME") {
        let nvcc = at(home.into());
        return if nvcc.exists() {
            nvcc
        } else {
            fail(&format!("R1_CUDA_HOME is set, but {} does not exist", nvcc.display()))
        };
    }
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("../..");
    let installed = fs::read_dir(root.join("target/gpu-toolchain/lib")).into_iter().flatten().flatten();
    let installed = installed.map(|python| python.path().join("site-packages/nvidia/cu13"));
    let variables = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let mut homes = installed.chain(variables).chain([PathBuf::from("/usr/local/cuda")]).map(at);
    let found = homes.find(|nvcc| nvcc.exists());
    found.unwrap_or_else(|| {
        fail("the feature `cuda` needs nvcc 13.0, and there is none in R1_CUDA_HOME, target/gpu-toolchain, CUDA_HOME, CUDA_PATH or /usr/local/cuda")
    })
}

fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(name)).find(|path| path.exists())
}

fn fail(why: &str) -> ! {
    // What cargo shows of a build script that gives an error; a panic would bury it.
    for line in why.lines().chain([HINT]) {
        println!("cargo::error={line}");
    }
    std::process::exit(1)
}
