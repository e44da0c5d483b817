//! Real plugin libraries, built if need be or from a folder, and the services that a model expects of its host.

use crate::Result;
use moeut_plugin_api::abi::client::{HostServices, KernelClient, PluginClient};
use moeut_plugin_api::{
    Capabilities, ComponentInfo, ComponentKind, DType, Device, HostInfo, LogLevel, PluginError,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The packages of the kernels.
const KERNELS: [&str; 3] = [
    "moeut-kernel-reference",
    "moeut-kernel-grouped",
    "moeut-kernel-cuda",
];
/// The packages of the models, each with what the names of its variants contain; the first that fits counts.
const MODELS: [(&str, &str); 3] = [
    ("sut", "moeut-model-sut"),
    ("rope", "moeut-model-dense"),
    ("moe", "moeut-model-moeut"),
];

/// Where libraries are, if they are not built.
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// From here on opens libraries of this folder, and builds none. Only the first call counts, and before [`open`].
pub fn open_from(folder: PathBuf) {
    let _first = FOLDER.set(folder);
}

/// The package of the model that has a variant.
///
/// # Errors
/// If there is none.
pub fn model_package(variant: &str) -> Result<&'static str> {
    let model = MODELS.iter().find(|(part, _)| variant.contains(part));
    let (_, package) = model.ok_or_else(|| format!("no model has the variant `{variant}`"))?;
    Ok(package)
}

/// The models of all packages that build, with their arguments.
pub fn model_components() -> Vec<ComponentInfo> {
    let opened = MODELS.iter().filter_map(|(_, package)| open(package).ok());
    let components = opened.filter_map(|plugin| plugin.components().ok());
    components.flatten().collect()
}

/// Opens the library of a package: of the folder of [`open_from`], else after `cargo build` has made sure that it is not
/// older than its source.
///
/// # Errors
/// If it does not build or open.
pub fn open(package: &str) -> Result<PluginClient> {
    static OPENED: Mutex<BTreeMap<String, std::result::Result<PluginClient, String>>> =
        Mutex::new(BTreeMap::new());
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let plugin = opened.entry(package.to_owned()).or_insert_with(|| {
        let library = match FOLDER.get() {
            Some(folder) => folder.join(file_name(package)),
            None => build(package).map_err(|error| error.to_string())?,
        };
        PluginClient::open(&library).map_err(|error| format!("{}: {error}", library.display()))
    });
    Ok(plugin.clone()?)
}

/// Builds a package with the profile of this program; gives its library.
fn build(package: &str) -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let folders = program.ancestors().skip(1);
    // Tests and examples are one folder deeper than programs.
    let is_deeper = |folder: &Path| folder.ends_with("deps") || folder.ends_with("examples");
    let folder = folders.into_iter().find(|folder| !is_deeper(folder));
    let folder = folder.ok_or("the program is in no target folder")?;
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .args(["build", "--quiet", "--package", package]);
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    let output = cargo.output()?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let first = errors.lines().find(|line| line.starts_with("error"));
        let reason = first.unwrap_or("cargo says nothing");
        return Err(format!(
            "plugin `{package}` does not build: {reason}; `cargo build --release --package {package}` says more"
        )
        .into());
    }
    Ok(folder.join(file_name(package)))
}

fn file_name(package: &str) -> String {
    format!("lib{}.so", package.replace('-', "_"))
}

/// A kernel under test.
#[derive(Clone)]
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
            n_ranks: 1,
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
