//! Compiles the C++ shim against the headers of the libtorch that torch-sys found. Nothing of libtorch's CUDA half is
//! linked, so that one build serves machines with and without it.

use std::env;
use std::path::PathBuf;

const SOURCES: [&str; 5] = [
    "cpp/store.cpp",
    "cpp/collectives.cpp",
    "cpp/gloo.cpp",
    "cpp/nccl.cpp",
    "cpp/hooks.cpp",
];

fn main() -> Result<(), String> {
    // `guard.h`: errors and arguments cross as in moeut-torch.
    let shared = "../../plugin-api/torch/cpp";
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-changed={shared}/guard.h");

    let lib = env::var_os("DEP_TCH_LIBTORCH_LIB")
        .map(PathBuf::from)
        .ok_or("libtorch is not installed: run `cargo xtask setup`")?;
    let include = lib.with_file_name("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .pic(true)
        // As system headers: their warnings are not ours.
        .flag("-isystem")
        .flag(&include)
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include"))
        .include("cpp")
        .include(shared)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .define("USE_C10D_GLOO", None)
        .files(SOURCES)
        .try_compile("moeut_c10d_shim")
        .map_err(|error| error.to_string())?;

    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    Ok(())
}
