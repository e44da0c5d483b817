//! Tells the manifest for which target and profile it is built.

fn main() {
    for (name, from) in [("MOEUT_TARGET", "TARGET"), ("MOEUT_PROFILE", "PROFILE")] {
        let value = std::env::var(from).unwrap_or_default();
        println!("cargo::rustc-env={name}={value}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
