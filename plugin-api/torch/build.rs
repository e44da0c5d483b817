//! Compiles the C++ shim against the headers of the libtorch that torch-sys found.

use std::env;
use std::path::PathBuf;

const SOURCES: [&str; 13] = [
    "cpp/list.cpp",
    "cpp/function.cpp",
    "cpp/optim.cpp",
    "cpp/device.cpp",
    "cpp/determinism.cpp",
    "cpp/readback.cpp",
    "cpp/profiler.cpp",
    "cpp/saving.cpp",
    "cpp/recompute.cpp",
    "cpp/graph.cpp",
    "cpp/relu_linear.cpp",
    "cpp/frugal.cpp",
    "cpp/terminate.cpp",
];

fn main() -> Result<(), String> {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");

    let lib = libtorch_lib()?;
    let include = lib.with_file_name("include");
    if !include.join("ATen/core/Tensor.h").is_file() || !lib.join("libtorch_cpu.so").is_file() {
        return Err(format!(
            "no libtorch in `{}`: run `cargo xtask setup`",
            lib.with_file_name("").display()
        ));
    }
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
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .files(SOURCES)
        .try_compile("moeut_torch_shim")
        .map_err(|error| error.to_string())?;

    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    Ok(())
}

/// The folder of libtorch's libraries: torch-sys tells its direct dependents.
fn libtorch_lib() -> Result<PathBuf, String> {
    if let Some(lib) = env::var_os("DEP_TCH_LIBTORCH_LIB") {
        return Ok(PathBuf::from(lib));
    }
    env::var_os("LIBTORCH")
        .map(|root| PathBuf::from(root).join("lib"))
        .ok_or_else(|| "libtorch is not installed: run `cargo xtask setup`".to_owned())
}
