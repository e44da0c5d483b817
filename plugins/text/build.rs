//! Compiles the C++ shim over SentencePiece. The library itself is built by `sentencepiece-sys`; its headers
//! are read from that crate's source folder, which only Cargo knows.

use std::{error::Error, path::PathBuf, process::Command};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=cpp");
    println!("cargo::rerun-if-changed=build.rs");
    // Names the version of `sentencepiece-sys`, whose headers are used.
    println!("cargo::rerun-if-changed=Cargo.toml");
    let headers = sentencepiece_source()?.join("source/src");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .include("cpp")
        // Somebody else's headers: their warnings are not ours.
        .flag("-isystem")
        .flag(headers.to_string_lossy().as_ref())
        .file("cpp/sentencepiece_shim.cc")
        .compile("moeut_sentencepiece_shim");
    // `sentencepiece-sys` links the library that encodes; the one that trains lies beside it.
    println!("cargo::rustc-link-lib=static=sentencepiece_train");
    Ok(())
}

/// The folder of the `sentencepiece-sys` crate that this build uses.
fn sentencepiece_source() -> Result<PathBuf, Box<dyn Error>> {
    // Offline first: the crate is there, or this build would not have started. A package of the workspace that
    // has nothing to do with us may still be missing from Cargo's store, so a second attempt may fetch.
    let metadata = cargo_metadata(&["--offline"]).or_else(|_| cargo_metadata(&[]))?;
    metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "sentencepiece-sys")
        .and_then(|package| {
            PathBuf::from(package["manifest_path"].as_str()?)
                .parent()
                .map(Into::into)
        })
        .ok_or_else(|| "`cargo metadata` does not list the package `sentencepiece-sys`".into())
}

fn cargo_metadata(extra: &[&str]) -> Result<serde_json::Value, Box<dyn Error>> {
    let manifest = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("Cargo.toml");
    let output = Command::new(std::env::var("CARGO")?)
        .args(["metadata", "--format-version", "1", "--filter-platform"])
        .arg(std::env::var("TARGET")?)
        .arg("--manifest-path")
        .arg(manifest)
        .args(extra)
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}
