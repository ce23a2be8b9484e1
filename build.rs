//! Compiles the C++ seam of `src/jit` against the libtorch that torch-sys found, and makes the binary find it at run time.

use std::path::{Path, PathBuf};

/// The torch release whose C++ interface the seam is written for; tch 0.24 goes with the same one.
const TORCH_VERSION: &str = "2.11.0";

fn main() {
    let library_dir = PathBuf::from(
        std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys reports its library folder to dependent build scripts"),
    );
    let torch = library_dir.parent().expect("libtorch's lib folder has a parent").to_path_buf();
    check_version(&torch);

    let sources = [
        "module.cc",
        "bounds.cc",
        "listing.cc",
        "clean.cc",
        "run.cc",
        "gradients.cc",
        "emit.cc",
        "edit.cc",
        "device.cc",
    ];
    let mut build = cxx_build::bridge("src/jit/ffi.rs");
    build.file(one_unit(&sources));
    for include in ["include", "include/torch/csrc/api/include"] {
        // System headers: libtorch's own warnings are not ours to mend.
        build.flag("-isystem").flag(torch.join(include).to_str().expect("the path of libtorch is UTF-8"));
    }
    // Warnings of GCC's optimizer: inlined code of libtorch sets them off, in some versions and optimization levels.
    for flow in ["array-bounds", "dangling-pointer", "free-nonheap-object", "maybe-uninitialized", "stringop-overflow"]
    {
        build.flag_if_supported(format!("-Wno-{flow}"));
    }
    build
        .std("c++17")
        .warnings(true)
        .extra_warnings(true)
        .warnings_into_errors(true)
        // cxx's generated code compares in ways that -Wextra dislikes on some compilers.
        .flag_if_supported("-Wno-unused-parameter")
        .compile("tsquant_jit");

    if library_dir.join("libtorch_cuda.so").exists() {
        leave_cuda_to_run_time();
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", library_dir.display());
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/jit/ffi.rs");
    println!("cargo:rerun-if-changed=src/jit/cpp");
}

/// A file that includes these: libtorch's headers take several times as long as what they are included for, and are read once so.
fn one_unit(sources: &[&str]) -> PathBuf {
    let folder = std::env::current_dir().expect("cargo runs this in the package's folder").join("src/jit/cpp");
    let lines = sources.iter().map(|source| format!("#include \"{}\"\n", folder.join(source).display()));
    let unit = PathBuf::from(std::env::var("OUT_DIR").expect("cargo tells where to write")).join("seam.cc");
    std::fs::write(&unit, lines.collect::<String>()).expect("the folder of build outputs takes a file");
    unit
}

/// torch-sys links whatever CUDA libraries it finds, and libtorch.so of such a torch needs them too: the program would open them at
/// its start, on machines without a GPU as well. Under both names the linker finds libtorch_cpu here, before it looks elsewhere.
fn leave_cuda_to_run_time() {
    let folder = PathBuf::from(std::env::var("OUT_DIR").expect("cargo tells where to write")).join("link");
    std::fs::create_dir_all(&folder).expect("the folder of build outputs takes a folder");
    for name in ["libtorch.so", "libtorch_cuda.so"] {
        std::fs::write(folder.join(name), "INPUT(-ltorch_cpu)\n").expect("the folder of build outputs takes a file");
    }
    println!("cargo:rustc-link-search=native={}", folder.display());
}

/// Stops the build, naming both versions, where libtorch is of another release.
fn check_version(torch: &Path) {
    let found = std::fs::read_to_string(torch.join("build-version"))
        .ok()
        .or_else(|| {
            let text = std::fs::read_to_string(torch.join("version.py")).ok()?;
            Some(text.split_once("__version__ = '")?.1.split_once('\'')?.0.to_owned())
        })
        .map(|version| version.trim().split('+').next().unwrap_or_default().to_owned());
    if let Some(found) = found
        && found != TORCH_VERSION
    {
        panic!("tsquant needs torch {TORCH_VERSION}, but {} is torch {found}", torch.display());
    }
}
