//! Opens a checked plugin file and compares what it registers with what its manifest said.

use super::inspect::{Manifest, Refusal, describe, parse_records};
use super::needs::{Here, Needs};
use moeut_plugin_api::ComponentInfo;
use moeut_plugin_api::abi::client::{OpenError, PluginClient};
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// An opened plugin. It stays open for the life of the process.
pub struct Library {
    /// What its file says.
    pub manifest: Manifest,
    /// The way to call it.
    pub client: PluginClient,
    /// What it registers.
    pub components: Vec<ComponentInfo>,
}

/// Opens a plugin.
///
/// # Errors
/// If the loader refuses it, or its code and its manifest disagree.
pub fn open(manifest: Manifest) -> Result<Library, Refusal> {
    match open_and_compare(&manifest) {
        Ok((client, components)) => Ok(Library {
            manifest,
            client,
            components,
        }),
        Err(refusal) => {
            // It may be loaded all the same, and the loader knows it by the number of this handle: given to the next
            // file, that number would mean this one.
            std::mem::forget(manifest.image);
            Err(refusal)
        }
    }
}

fn open_and_compare(manifest: &Manifest) -> Result<(PluginClient, Vec<ComponentInfo>), Refusal> {
    // What was hashed: the path may point elsewhere by now.
    let handle = PathBuf::from(format!("/proc/self/fd/{}", manifest.image.as_raw_fd()));
    let client = PluginClient::open(&handle).map_err(|error| refusal(&error, &handle, manifest))?;
    let (plugin, _) = parse_records(client.manifest().as_bytes())?;
    let components = client
        .components()
        .map_err(|error| Refusal::Load(error.to_string()))?;

    let said: Vec<_> = manifest
        .components
        .iter()
        .map(|component| (component.kind, component.name.clone()))
        .collect();
    let registered: Vec<_> = components
        .iter()
        .map(|component| (component.kind, component.name.clone()))
        .collect();
    if said != registered || plugin != manifest.plugin {
        return Err(Refusal::LyingManifest {
            said: describe(said.into_iter()),
            registered: describe(registered.into_iter()),
        });
    }
    Ok((client, components))
}

/// The loader names one symbol that it did not find; all of them, and where they should have been, say more.
fn refusal(error: &OpenError, handle: &Path, manifest: &Manifest) -> Refusal {
    let unresolved = || {
        let mut bytes = Vec::new();
        let mut file = &manifest.image;
        file.rewind().ok()?;
        file.read_to_end(&mut bytes).ok()?;
        let resolution = Here::now().resolve(&Needs::read(&bytes).ok()?).ok()?;
        resolution.problem(moeut_torch::LIBTORCH_VERSION)
    };
    if let OpenError::Loader(_) = error
        && let Some(problem) = unresolved()
    {
        return Refusal::Unresolved(problem);
    }
    let text = error.to_string();
    let path = manifest.path.display().to_string();
    Refusal::Load(text.replace(&handle.display().to_string(), &path))
}
