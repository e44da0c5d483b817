//! The manifest: JSON lines in a named ELF section, readable before the library is opened.
//!
//! [`crate::export_plugin!`] writes one record about the plugin, each `register_…!` one about its component; the
//! linker puts them one behind the other. Each record is also reachable from code, so that no linker drops it.

use crate::ComponentKind;
use serde::{Deserialize, Serialize};

/// Name of the section.
pub const SECTION: &str = ".moeut.plugin";

/// The target triple that this API, and so the plugin, was built for.
pub const TARGET: &str = env!("MOEUT_TARGET");
/// The build profile, `release` or `debug`.
pub const PROFILE: &str = env!("MOEUT_PROFILE");

/// One line of the section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// About the library.
    Plugin(PluginRecord),
    /// About one component in it.
    Component(ComponentRecord),
}

/// What a library says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginRecord {
    /// ABI version, `major.minor`.
    pub abi: String,
    /// The plugin's crate name.
    pub name: String,
    /// Its semantic version.
    pub version: String,
    /// The libtorch it was built against; empty if it does not use libtorch.
    pub libtorch: String,
    /// Target triple.
    pub target: String,
    /// `release` or `debug`.
    pub profile: String,
    /// Commit it was built from; empty if unknown.
    pub git: String,
    /// Its licence.
    pub license: String,
    /// Its authors.
    pub authors: String,
}

/// A component's kind and name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComponentRecord {
    /// What it is.
    pub kind: ComponentKind,
    /// What it is called.
    pub name: String,
}

/// Total length of `parts`.
pub const fn total_len(parts: &[&str]) -> usize {
    let (mut total, mut i) = (0, 0);
    while i < parts.len() {
        total += parts[i].len();
        i += 1;
    }
    total
}

/// Joins `parts` at compile time.
///
/// # Panics
/// At compile time, if an odd part (a value, by convention) holds a character that JSON would need to escape.
pub const fn concat<const N: usize>(parts: &[&str]) -> [u8; N] {
    let mut out = [0; N];
    let (mut at, mut i) = (0, 0);
    while i < parts.len() {
        let bytes = parts[i].as_bytes();
        let mut j = 0;
        while j < bytes.len() {
            let is_value = i % 2 == 1;
            assert!(
                !is_value || (bytes[j] != b'"' && bytes[j] != b'\\' && bytes[j] >= b' '),
                "manifest values must not hold quotes, backslashes or control characters"
            );
            out[at] = bytes[j];
            at += 1;
            j += 1;
        }
        i += 1;
    }
    out
}

/// Writes one record into the manifest section. For the macros of this crate.
#[doc(hidden)]
#[macro_export]
macro_rules! __manifest_record {
    ($static:ident, $parts:expr) => {
        #[used]
        #[unsafe(link_section = ".moeut.plugin")]
        static $static: [u8; $crate::abi::manifest::total_len($parts)] =
            $crate::abi::manifest::concat($parts);
    };
}

/// Makes the crate a plugin: exports its root module and its manifest.
///
/// Write `export_plugin!();` once in `lib.rs`; a plugin that uses libtorch writes
/// `export_plugin!(libtorch = moeut_torch::LIBTORCH_VERSION);`.
#[macro_export]
macro_rules! export_plugin {
    () => {
        $crate::export_plugin!(libtorch = "");
    };
    (libtorch = $libtorch:expr) => {
        $crate::__manifest_record!(
            MOEUT_PLUGIN_RECORD,
            &[
                "{\"record\":\"plugin\",\"abi\":\"1.4\",\"name\":\"",
                env!("CARGO_PKG_NAME"),
                "\",\"version\":\"",
                env!("CARGO_PKG_VERSION"),
                "\",\"libtorch\":\"",
                $libtorch,
                "\",\"target\":\"",
                $crate::abi::manifest::TARGET,
                "\",\"profile\":\"",
                $crate::abi::manifest::PROFILE,
                "\",\"git\":\"",
                match option_env!("MOEUT_GIT_HASH") {
                    Some(hash) => hash,
                    None => "",
                },
                "\",\"license\":\"",
                env!("CARGO_PKG_LICENSE"),
                "\",\"authors\":\"",
                env!("CARGO_PKG_AUTHORS"),
                "\"}\n",
            ]
        );

        extern "C" fn moeut_manifest() -> $crate::__private::RString {
            $crate::__private::manifest(&MOEUT_PLUGIN_RECORD)
        }

        fn moeut_module() -> $crate::abi::PluginModuleRef {
            $crate::__private::module(moeut_manifest)
        }

        extern "C" fn moeut_root_module() -> $crate::__private::RootModuleResult {
            $crate::__private::load(moeut_module)
        }

        // The name under which abi_stable looks for a library's root module; a test compares it.
        #[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
        static MOEUT_LIBRARY_HEADER: $crate::__private::LibHeader =
            $crate::__private::library_header(moeut_root_module);
    };
}

/// Registers one component. For the macros below.
#[doc(hidden)]
#[macro_export]
macro_rules! __register {
    ($component:ty, $trait:path, $kind:literal, $maker:ident) => {
        const _: () = {
            $crate::__manifest_record!(
                RECORD,
                &[
                    "{\"record\":\"component\",\"kind\":\"",
                    $kind,
                    "\",\"name\":\"",
                    <$component as $trait>::NAME,
                    "\"}\n",
                ]
            );
            $crate::__private::inventory::submit! {
                $crate::abi::shim::Registration::$maker::<$component>(env!("CARGO_PKG_NAME"), &RECORD)
            }
        };
    };
}

/// Registers a [`crate::Task`].
#[macro_export]
macro_rules! register_task {
    ($task:ty) => {
        $crate::__register!($task, $crate::Task, "task", task);
    };
}

/// Registers a [`crate::TokenDataset`].
#[macro_export]
macro_rules! register_token_dataset {
    ($dataset:ty) => {
        $crate::__register!($dataset, $crate::TokenDataset, "dataset", token_dataset);
    };
}

/// Registers a [`crate::ChoiceDataset`].
#[macro_export]
macro_rules! register_choice_dataset {
    ($dataset:ty) => {
        $crate::__register!(
            $dataset,
            $crate::ChoiceDataset,
            "choice_dataset",
            choice_dataset
        );
    };
}

/// Registers a [`crate::Model`].
#[macro_export]
macro_rules! register_model {
    ($model:ty) => {
        $crate::__register!($model, $crate::Model, "model", model);
    };
}

/// Registers a [`crate::Kernel`].
#[macro_export]
macro_rules! register_kernel {
    ($kernel:ty) => {
        $crate::__register!($kernel, $crate::Kernel, "kernel", kernel);
    };
}
