//! Real plugin libraries, built if need be, and the services that a model expects of its host.

use crate::Result;
use moeut_plugin_api::abi::client::{HostServices, KernelClient, PluginClient};
use moeut_plugin_api::{
    Capabilities, ComponentKind, DType, Device, HostInfo, LogLevel, PluginError,
};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};

/// The packages of the models under test.
const MODELS: [&str; 3] = ["moeut-model-moeut", "moeut-model-sut", "moeut-model-dense"];
/// The packages of the kernels.
const KERNELS: [&str; 2] = ["moeut-kernel-reference", "moeut-kernel-grouped"];

/// The package of the model that a variant belongs to.
pub fn model_of(variant: &str) -> &'static str {
    let [moeut, sut, dense] = MODELS;
    match variant {
        _ if variant.contains("sut") => sut,
        _ if variant.contains("rope") => dense,
        _ => moeut,
    }
}

/// Opens the library of a package, after `cargo build` has made sure that it is not older than its source.
///
/// # Errors
/// If it does not build or open.
pub fn open(package: &str) -> Result<PluginClient> {
    static BUILT: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    let folder = BUILT
        .get_or_init(|| build().map_err(|error| error.to_string()))
        .clone()?;
    let library = folder.join(format!("lib{}.so", package.replace('-', "_")));
    Ok(PluginClient::open(&library).map_err(|error| format!("{}: {error}", library.display()))?)
}

/// Builds all packages with the profile of this program; gives the folder of the libraries.
fn build() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let folder = program
        .ancestors()
        .nth(2)
        .ok_or("the program is in no target folder")?;
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--manifest-path"]);
    cargo.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"));
    if folder.file_name().is_some_and(|name| name == "release") {
        cargo.arg("--release");
    }
    for package in MODELS.iter().chain(&KERNELS) {
        cargo.args(["--package", package]);
    }
    let status = cargo.status()?;
    if !status.success() {
        return Err(format!("{cargo:?}: {status}").into());
    }
    Ok(folder.to_owned())
}

/// A kernel under test.
pub struct KernelPlugin {
    /// What a user types after `-moe.kernel`.
    pub name: String,
    /// What it says that it can.
    pub capabilities: Capabilities,
    library: PluginClient,
}

/// All kernels that the plugins register; the first is the oracle of the others.
///
/// # Errors
/// If a library does not build or open.
pub fn kernels() -> Result<Vec<KernelPlugin>> {
    let mut kernels = Vec::new();
    for package in KERNELS {
        let library = open(package)?;
        for component in library.components()? {
            let Some(capabilities) = component.capabilities else {
                continue;
            };
            if component.kind == ComponentKind::Kernel {
                kernels.push(KernelPlugin {
                    name: component.name,
                    capabilities,
                    library,
                });
            }
        }
    }
    Ok(kernels)
}

/// A host with one kernel, whatever the model asks for.
#[derive(Clone)]
struct Services {
    library: PluginClient,
    name: String,
}

/// Services that give models `kernel`.
pub fn services(kernel: &KernelPlugin) -> Arc<dyn HostServices> {
    Arc::new(Services {
        library: kernel.library,
        name: kernel.name.clone(),
    })
}

impl HostServices for Services {
    fn info(&self) -> HostInfo {
        HostInfo {
            cache_dir: std::env::temp_dir(),
            n_threads: 1,
            compat: true,
        }
    }

    fn log(&self, _: LogLevel, _: &str) {}

    fn progress(&self, _: &str, _: u64, _: u64) {}

    fn is_cancelled(&self) -> bool {
        false
    }

    fn kernel(
        &self,
        _: &str,
        _: Device,
        _: DType,
    ) -> std::result::Result<KernelClient, PluginError> {
        let services: Arc<dyn HostServices> = Arc::new(self.clone());
        self.library.new_kernel(&self.name, &services)
    }
}
