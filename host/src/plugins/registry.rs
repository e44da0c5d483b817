//! All components that are there, by kind and name.

use super::folders::Folder;
use super::library::Library;
use super::lock::Gate;
use super::screening::{Problem, Screening};
use crate::args::nearest;
use moeut_plugin_api::abi::client::PluginClient;
use moeut_plugin_api::abi::manifest::PluginRecord;
use moeut_plugin_api::{Capabilities, ComponentInfo, ComponentKind, DType, Device, PluginError};
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// The plugins of a search path, opened.
pub struct Registry {
    libraries: Vec<Library>,
    folders: Vec<Folder>,
    screening: Screening,
}

/// One component of an opened plugin.
#[derive(Clone, Copy)]
pub struct Component<'a> {
    /// The plugin it is in.
    pub library: &'a Library,
    /// What it is.
    pub info: &'a ComponentInfo,
}

impl Component<'_> {
    /// The way to call its plugin.
    pub fn client(&self) -> PluginClient {
        self.library.client
    }

    /// Heading for help and errors: ``task `moeut_c4` (moeut-task-moeut-c4 0.1.0)``.
    pub fn heading(&self) -> String {
        let plugin = &self.library.manifest.plugin;
        format!(
            "{} `{}` ({} {})",
            self.info.kind, self.info.name, plugin.name, plugin.version
        )
    }
}

/// `it computes f32, f64 on the CPU and nothing on a GPU`.
fn abilities(capabilities: Option<&Capabilities>) -> String {
    let list = |types: &[DType]| match types {
        [] => "nothing".to_owned(),
        types => types
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", "),
    };
    match capabilities {
        Some(Capabilities { cpu, cuda, .. }) => {
            format!(
                "it computes {} on the CPU and {} on a GPU",
                list(cpu),
                list(cuda)
            )
        }
        None => "it does not say what it can".to_owned(),
    }
}

/// How to say `plugin` so that `other` is not meant.
fn distinct(plugin: &PluginRecord, other: &PluginRecord) -> String {
    if plugin.name == other.name {
        format!("{}:{}", plugin.name, plugin.version)
    } else {
        plugin.name.clone()
    }
}

impl Registry {
    /// Opens every plugin of the search path that passes inspection and that the gate lets through.
    pub fn open(folders: Vec<Folder>, gate: Gate) -> Self {
        let mut screening = Screening::new(gate);
        let mut libraries = Vec::new();
        for folder in &folders {
            for path in screening.files(folder) {
                libraries.extend(screening.open(&path));
            }
        }
        Self {
            libraries,
            folders,
            screening,
        }
    }

    /// Files that were skipped.
    pub fn problems(&self) -> &[Problem] {
        self.screening.problems()
    }

    /// What a user may want to know about the files that were taken.
    pub fn notes(&self) -> &[String] {
        self.screening.notes()
    }

    /// The folders that were searched.
    pub fn folders(&self) -> &[Folder] {
        &self.folders
    }

    /// What lets files through.
    pub fn gate(&self) -> &Gate {
        self.screening.gate()
    }

    /// Every opened plugin, in search order.
    pub fn libraries(&self) -> &[Library] {
        &self.libraries
    }

    /// SHA-256 of every opened plugin, by name and version.
    pub fn hashes(&self) -> BTreeMap<String, String> {
        let mut hashes = BTreeMap::new();
        for manifest in self.libraries.iter().map(|library| &library.manifest) {
            let plugin = &manifest.plugin;
            let name = format!("{} {}", plugin.name, plugin.version);
            // The first one is the one that is used.
            hashes
                .entry(name)
                .or_insert_with(|| manifest.sha256.clone());
        }
        hashes
    }

    /// Every component of every opened plugin, shadowed ones too, in search order.
    pub fn components(&self) -> impl Iterator<Item = Component<'_>> {
        self.libraries.iter().flat_map(|library| {
            library
                .components
                .iter()
                .map(move |info| Component { library, info })
        })
    }

    /// The component that `wanted` means: a name, an alias, `name@plugin` or `name@plugin:version`.
    ///
    /// # Errors
    /// If there is none, or two different files of one folder have it and neither was chosen.
    pub fn find(&self, kind: ComponentKind, wanted: &str) -> Result<Component<'_>, PluginError> {
        let (name, plugin) = match wanted.split_once('@') {
            Some((name, plugin)) => (name, Some(plugin)),
            None => (wanted, None),
        };
        let is_chosen = |of: &PluginRecord| match plugin.map(|plugin| plugin.split_once(':')) {
            None => true,
            Some(None) => plugin == Some(&of.name),
            Some(Some((plugin, version))) => plugin == of.name && version == of.version,
        };
        let matches: Vec<Component<'_>> = self
            .components()
            .filter(|component| component.info.kind == kind)
            .filter(|component| {
                component.info.name == name
                    || component.info.aliases.iter().any(|alias| alias == name)
            })
            .filter(|component| is_chosen(&component.library.manifest.plugin))
            .collect();
        let Some(&first) = matches.first() else {
            return Err(self.missing(kind, name, plugin));
        };
        let folder = first.library.manifest.path.parent();
        let rival = matches[1..]
            .iter()
            .find(|other| other.library.manifest.path.parent() == folder);
        match rival {
            None => Ok(first),
            Some(rival) => Err(PluginError::new(format!(
                "two plugins of one folder have the {kind} `{name}`"
            ))
            .why(format!(
                "`{}` and `{}`",
                first.library.manifest.path.display(),
                rival.library.manifest.path.display()
            ))
            .fix(format!(
                "remove one of the files, or say which: `{name}@{}`",
                distinct(
                    &first.library.manifest.plugin,
                    &rival.library.manifest.plugin
                )
            ))),
        }
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// If there is none, or it does not support device and element type.
    pub fn find_kernel(
        &self,
        name: &str,
        device: Device,
        dtype: DType,
    ) -> Result<Component<'_>, PluginError> {
        let component = self.find(ComponentKind::Kernel, name)?;
        let capabilities = component.info.capabilities.as_ref();
        if capabilities.is_some_and(|capabilities| capabilities.supports(device, dtype)) {
            return Ok(component);
        }
        Err(PluginError::new(format!(
            "kernel `{name}` does not support {dtype} on {device}"
        ))
        .why(abilities(capabilities))
        .fix("set `-moe.kernel auto`"))
    }

    /// The kernels that support device and element type, the fastest first; of equally fast ones that of the folder
    /// that is searched first.
    ///
    /// # Errors
    /// If there is none.
    pub fn kernels(&self, device: Device, dtype: DType) -> Result<Vec<Component<'_>>, PluginError> {
        let mut found: Vec<(u32, Component<'_>)> = self
            .components()
            .filter(|component| component.info.kind == ComponentKind::Kernel)
            .filter_map(|component| {
                let capabilities = component.info.capabilities.as_ref()?;
                let rank = capabilities.speed_rank;
                capabilities
                    .supports(device, dtype)
                    .then_some((rank, component))
            })
            .collect();
        found.sort_by_key(|(rank, _)| Reverse(*rank));
        if found.is_empty() {
            return Err(PluginError::new(format!("no kernel supports {dtype} on {device}"))
                .why(format!("found {}", self.names(ComponentKind::Kernel)))
                .fix("put a kernel plugin into a plugin folder; `moeut-host plugins list` shows them"));
        }
        Ok(found.into_iter().map(|(_, component)| component).collect())
    }

    fn names(&self, kind: ComponentKind) -> String {
        let of_kind = self
            .components()
            .filter(|component| component.info.kind == kind);
        let names: Vec<String> = of_kind
            .map(|component| format!("`{}`", component.info.name))
            .collect();
        if names.is_empty() {
            format!("no {kind}s at all")
        } else {
            names.join(", ")
        }
    }

    fn missing(&self, kind: ComponentKind, name: &str, plugin: Option<&str>) -> PluginError {
        let what = match plugin {
            None => format!("unknown {kind} `{name}`"),
            Some(plugin) => format!("unknown {kind} `{name}` of plugin `{plugin}`"),
        };
        let refused = self.screening.problems().iter().find(|problem| {
            problem
                .would_provide
                .iter()
                .any(|(k, n)| *k == kind && n == name)
        });
        if let Some(problem) = refused {
            return PluginError::new(what)
                .why(format!("{}: {}", problem.error.what, problem.error.why))
                .fix(problem.error.fix.clone());
        }
        let known: Vec<String> = self
            .components()
            .filter(|component| component.info.kind == kind)
            .flat_map(|component| {
                std::iter::once(&component.info.name).chain(&component.info.aliases)
            })
            .cloned()
            .collect();
        let near = nearest(name, known.iter().map(String::as_str));
        let fix = if near.is_empty() {
            "`moeut-host plugins list` shows what there is, `moeut-host doctor` what is wrong"
                .to_owned()
        } else {
            let near: Vec<String> = near.iter().map(|name| format!("`{name}`")).collect();
            format!("did you mean {}?", near.join(" or "))
        };
        PluginError::new(what)
            .why(format!("found {}", self.names(kind)))
            .fix(fix)
    }
}
