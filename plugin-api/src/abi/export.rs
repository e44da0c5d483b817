//! What [`crate::export_plugin!`] needs to make a library a plugin.
//!
//! `abi_stable`'s own attribute expands to an attribute that edition 2024 refuses, and asks authors to depend on
//! `abi_stable`; these few lines do the same without either.

use super::{PluginModule, PluginModuleRef, shim};
use abi_stable::library::{__call_root_module_loader, CheckTypeLayout};
use abi_stable::prefix_type::PrefixTypeTrait;

pub use abi_stable::library::{LibHeader, RootModuleResult};
pub use abi_stable::std_types::RString;

/// The header through which the host finds the root module.
pub const fn library_header(root_module: extern "C" fn() -> RootModuleResult) -> LibHeader {
    // SAFETY: `root_module` is made by `export_plugin!`, and returns a `PluginModuleRef` as promised here.
    unsafe { LibHeader::from_constructor::<PluginModuleRef>(root_module, CheckTypeLayout::Yes) }
}

/// Runs the constructor of the root module; a panic in it becomes a load error.
pub fn load(module: fn() -> PluginModuleRef) -> RootModuleResult {
    __call_root_module_loader(module)
}

/// The root module of a plugin that registers its components with `inventory`.
pub fn module(manifest: extern "C" fn() -> RString) -> PluginModuleRef {
    PluginModule {
        manifest,
        components: shim::components,
        new_task: shim::new_task,
        new_token_dataset: shim::new_token_dataset,
        new_model: shim::new_model,
        new_kernel: shim::new_kernel,
        new_choice_dataset: shim::new_choice_dataset,
        count_documents: shim::count_documents,
    }
    .leak_into_prefix()
}

/// The manifest as the root module returns it.
pub fn manifest(plugin: &'static [u8]) -> RString {
    let mut text = String::from_utf8_lossy(plugin).into_owned();
    text.push_str(&shim::component_records());
    text.into()
}
