//! Reads what a file says about itself, and decides whether it may be opened. Runs nothing of it.

use super::screening::Candidate;
use moeut_plugin_api::abi::manifest::{ComponentRecord, PluginRecord, Record, SECTION};
use moeut_plugin_api::abi::{ABI_MAJOR, ABI_MINOR};
use moeut_plugin_api::{ComponentKind, PluginError};
use object::{Object, ObjectSection};
use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Larger files are no plugins of ours: the largest so far has 5 MB unstripped.
pub const MAX_BYTES: u64 = 1 << 30;

/// The longest name that the kernel takes for what lies in memory.
const MAX_IMAGE_NAME: usize = 249;

/// A plugin file that may be opened.
#[derive(Debug)]
pub struct Manifest {
    /// Where it is.
    pub path: PathBuf,
    /// Its owner, mode and times when it was read.
    pub metadata: Metadata,
    /// What is opened: a copy in memory of the bytes that were hashed.
    pub image: File,
    /// SHA-256 of the file, in hex.
    pub sha256: String,
    /// About the library.
    pub plugin: PluginRecord,
    /// Its components.
    pub components: Vec<ComponentRecord>,
}

/// Why a file is not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
    /// It is no library for this machine, or cut off.
    #[error("it is not a complete ELF library: {0}")]
    NotALibrary(String),
    /// It is a library without a manifest.
    #[error("it is a library, but holds no moeut manifest (section `{SECTION}`)")]
    NotAPlugin,
    /// Its manifest does not parse.
    #[error("its manifest is malformed: {0}")]
    BadManifest(String),
    /// It speaks another ABI.
    #[error("it was built for plugin ABI {found}, and this host speaks {ABI_MAJOR}.{ABI_MINOR}")]
    OtherAbi {
        /// What it was built for.
        found: String,
    },
    /// It was built against another libtorch.
    #[error("it was built against libtorch {found}, and this host has {have}")]
    OtherLibtorch {
        /// What it was built against.
        found: String,
        /// What is here.
        have: &'static str,
    },
    /// It was built for another kind of machine.
    #[error("it was built for {found}, and this is {have}")]
    OtherTarget {
        /// What it was built for.
        found: String,
        /// What is here.
        have: &'static str,
    },
    /// Anybody may change it, or the folder it is in.
    #[error("`{0}` may be written by everybody, and loading a plugin runs it")]
    WorldWritable(PathBuf),
    /// Somebody else may change it.
    #[error(
        "`{path}` belongs to user {owner}, who is neither you nor root, and loading a plugin runs it"
    )]
    ForeignOwner {
        /// The file or folder.
        path: PathBuf,
        /// Its owner's id.
        owner: u32,
    },
    /// It needs what the libraries of this program do not have.
    #[error("{0}")]
    Unresolved(String),
    /// The lock holds another file under its name.
    #[error("its SHA-256 is {found}, and `plugins.lock` says {locked} for `{name}`")]
    Changed {
        /// The plugin.
        name: String,
        /// What is locked.
        locked: String,
        /// What is here.
        found: String,
    },
    /// Only locked files are opened, and it is none.
    #[error(
        "`plugins.lock` does not name it, and `-plugin_verify strict` loads only what it names"
    )]
    NotLocked,
    /// The system's loader or the layout check refused it.
    #[error("{0}")]
    Load(String),
    /// What it registers is not what its manifest says.
    #[error("its manifest says that it holds {said}, but it registers {registered}")]
    LyingManifest {
        /// By the file.
        said: String,
        /// By the code.
        registered: String,
    },
}

impl Refusal {
    /// What to do about it.
    pub fn fix(&self, path: &Path) -> String {
        let path = path.display();
        match self {
            Self::Unreadable(_) => format!("check the permissions of `{path}`"),
            Self::NotALibrary(_) => format!("copy or build `{path}` anew"),
            Self::NotAPlugin | Self::BadManifest(_) => format!(
                "a plugin's `lib.rs` needs `moeut_plugin_api::export_plugin!()`; move `{path}` away if it is none"
            ),
            Self::OtherAbi { .. } => {
                format!("rebuild it against moeut-plugin-api {ABI_MAJOR}.{ABI_MINOR}")
            }
            Self::OtherLibtorch { have, .. } => format!("rebuild it against libtorch {have}"),
            Self::OtherTarget { have, .. } => format!("rebuild it for {have}"),
            Self::WorldWritable(place) => format!("type `chmod o-w {}`", place.display()),
            Self::ForeignOwner { path, .. } => format!(
                "if you trust it, copy it to a folder of your own, or type `chown $USER {}`",
                path.display()
            ),
            Self::Unresolved(_) => format!(
                "rebuild it on this machine, against libtorch {}",
                moeut_torch::LIBTORCH_VERSION
            ),
            Self::Changed { .. } | Self::NotLocked => {
                "if you trust the file, type `moeut-host plugins lock --update`".to_owned()
            }
            Self::Load(_) => "rebuild the plugin against this host".to_owned(),
            Self::LyingManifest { .. } => "rebuild the plugin from clean sources".to_owned(),
        }
    }

    /// As the error of whoever needs this file.
    pub fn into_error(self, path: &Path) -> PluginError {
        PluginError::new(format!("plugin file `{}` is refused", path.display()))
            .why(self.to_string())
            .fix(self.fix(path))
    }
}

/// A file as it was read.
#[derive(Debug)]
pub struct Contents {
    /// The handle that it was read through.
    pub file: File,
    /// Its owner, mode and times, of before it was read.
    pub metadata: Metadata,
    /// All of it.
    pub bytes: Vec<u8>,
    /// SHA-256 of the bytes, in hex.
    pub sha256: String,
}

impl Manifest {
    /// What the screening goes by.
    pub fn candidate(&self) -> Candidate<'_> {
        Candidate {
            path: &self.path,
            sha256: &self.sha256,
            plugin: &self.plugin.name,
            is_group_writable: self.metadata.mode() & 0o020 != 0,
        }
    }
}

/// Reads and checks a file.
///
/// # Errors
/// If it may not be opened; see [`Refusal`].
pub fn inspect(path: &Path) -> Result<Manifest, Refusal> {
    let contents = read(path)?;
    check_place(path, &contents.metadata)?;
    let (plugin, components) = read_records(&contents.bytes)?;
    check_abi(&plugin)?;
    check_target(&plugin)?;
    check_libtorch(&plugin)?;
    let image = image(path, contents.file, &contents.bytes)
        .map_err(|error| Refusal::Unreadable(error.to_string()))?;
    Ok(Manifest {
        path: path.to_owned(),
        metadata: contents.metadata,
        image,
        sha256: contents.sha256,
        plugin,
        components,
    })
}

/// A copy of the bytes in memory that nobody can write, this process included: what is opened is what was hashed, and a
/// run keeps it whatever becomes of the file. `cp` over a library that is mapped would end the run.
///
/// A system that forbids to run what is in memory leaves the handle that was read, against swaps but not overwriting.
fn image(path: &Path, file: File, bytes: &[u8]) -> std::io::Result<File> {
    let name = path.file_name().unwrap_or_default().as_bytes();
    let name = &name[..name.len().min(MAX_IMAGE_NAME)];
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let made = match memfd_create(name, flags | MemfdFlags::EXEC) {
        // Linux before 6.3 knows no such flag, and lets everything run.
        Err(Errno::INVAL) => memfd_create(name, flags),
        made => made,
    };
    let Ok(made) = made else {
        return Ok(file);
    };
    let mut image = File::from(made);
    image.write_all(bytes)?;
    // Not `WRITE`: for it the kernel waits until nobody else, itself included, has hold of the pages, and gives up (EBUSY)
    // where it is busy with them. A copy that cannot be sealed is still one that only this process knows.
    let seals = SealFlags::SEAL | SealFlags::FUTURE_WRITE | SealFlags::GROW | SealFlags::SHRINK;
    let _ = fcntl_add_seals(&image, seals);
    Ok(image)
}

/// Reads a file that may be a plugin.
///
/// # Errors
/// If it cannot be read, or is too large to be one.
pub fn read(path: &Path) -> Result<Contents, Refusal> {
    let unreadable = |error: std::io::Error| Refusal::Unreadable(error.to_string());
    // To open a pipe would wait for somebody to write into it.
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(nonblocking)
        .open(path)
        .map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(Refusal::Unreadable("it is no plain file".to_owned()));
    }
    if metadata.len() > MAX_BYTES {
        return Err(Refusal::NotALibrary(format!(
            "{} bytes are too many",
            metadata.len()
        )));
    }
    let mut bytes = Vec::new();
    let mut rest = (&mut file).take(MAX_BYTES);
    rest.read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(Contents {
        file,
        metadata,
        sha256: hex(&Sha256::digest(&bytes)),
        bytes,
    })
}

/// The components that a refused file says it has, for whoever asks for one of them; none if it does not say.
pub fn claims(path: &Path) -> Vec<(ComponentKind, String)> {
    let components = records(path).map_or_else(Vec::new, |(_, components)| components);
    components
        .into_iter()
        .map(|component| (component.kind, component.name))
        .collect()
}

/// What a file says of itself, whether or not it would be refused; none if it does not say.
pub fn records(path: &Path) -> Option<(PluginRecord, Vec<ComponentRecord>)> {
    read_records(&read(path).ok()?.bytes).ok()
}

/// Refuses a file that others may change, or replace: in its folder or, behind a link, in the one where it really is.
///
/// # Errors
/// If they may.
pub fn check_place(path: &Path, metadata: &Metadata) -> Result<(), Refusal> {
    let unreadable = |error: std::io::Error| Refusal::Unreadable(error.to_string());
    check_owner(path, metadata)?;
    let real = path.canonicalize().map_err(unreadable)?;
    for folder in [path.parent(), real.parent()].into_iter().flatten() {
        if folder != Path::new("") {
            check_owner(folder, &std::fs::metadata(folder).map_err(unreadable)?)?;
        }
    }
    Ok(())
}

/// Refuses what others may change; a sticky folder such as `/tmp` is as open as any.
fn check_owner(path: &Path, metadata: &Metadata) -> Result<(), Refusal> {
    if metadata.mode() & 0o002 != 0 {
        return Err(Refusal::WorldWritable(path.to_owned()));
    }
    let owner = metadata.uid();
    if owner != 0 && Some(owner) != current_user() {
        return Err(Refusal::ForeignOwner {
            path: path.to_owned(),
            owner,
        });
    }
    Ok(())
}

/// The effective user, as the owner of this process's folder in `/proc`.
pub(super) fn current_user() -> Option<u32> {
    std::fs::metadata("/proc/self")
        .ok()
        .map(|metadata| metadata.uid())
}

/// Finds and parses the manifest of a library.
///
/// # Errors
/// If it is no library for this kind of machine, or has no manifest.
pub fn read_records(bytes: &[u8]) -> Result<(PluginRecord, Vec<ComponentRecord>), Refusal> {
    let elf = parse(bytes)?;
    let machine = format!("{:?}", elf.architecture());
    if !machine.eq_ignore_ascii_case(std::env::consts::ARCH) {
        return Err(Refusal::OtherTarget {
            found: format!("a machine of kind {machine}"),
            have: moeut_plugin_api::abi::manifest::TARGET,
        });
    }
    records_of(&elf)
}

/// As [`read_records`], also for libraries of other machines, which are packed and not opened.
///
/// # Errors
/// If it is no library, or has no manifest.
pub fn read_records_of_any_machine(
    bytes: &[u8],
) -> Result<(PluginRecord, Vec<ComponentRecord>), Refusal> {
    records_of(&parse(bytes)?)
}

fn parse(bytes: &[u8]) -> Result<object::File<'_>, Refusal> {
    object::File::parse(bytes).map_err(|error| Refusal::NotALibrary(error.to_string()))
}

fn records_of(elf: &object::File<'_>) -> Result<(PluginRecord, Vec<ComponentRecord>), Refusal> {
    let section = elf.section_by_name(SECTION).ok_or(Refusal::NotAPlugin)?;
    let data = section.data();
    parse_records(data.map_err(|error| Refusal::NotALibrary(error.to_string()))?)
}

/// Parses the manifest's lines.
///
/// # Errors
/// If a line is no record, or there is not exactly one about the plugin.
pub fn parse_records(section: &[u8]) -> Result<(PluginRecord, Vec<ComponentRecord>), Refusal> {
    let malformed = |error: &dyn std::fmt::Display| Refusal::BadManifest(error.to_string());
    // The linker may pad between records.
    let text = std::str::from_utf8(section).map_err(|error| malformed(&error))?;
    let lines = text.split('\n').map(|line| line.trim_matches(['\0', ' ']));
    let (mut plugins, mut components) = (Vec::new(), Vec::new());
    for line in lines.filter(|line| !line.is_empty()) {
        match serde_json::from_str(line).map_err(|error| malformed(&error))? {
            Record::Plugin(plugin) => plugins.push(plugin),
            Record::Component(component) => components.push(component),
        }
    }
    components.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
    let twice = components.windows(2).find(|pair| pair[0] == pair[1]);
    if let Some([ComponentRecord { kind, name }, ..]) = twice {
        return Err(malformed(&format!("{kind} `{name}` is registered twice")));
    }
    match <[PluginRecord; 1]>::try_from(plugins) {
        Ok([plugin]) => Ok((plugin, components)),
        Err(plugins) => Err(malformed(&format!(
            "{} records about the plugin",
            plugins.len()
        ))),
    }
}

/// Refuses another major version of the ABI and a newer minor one.
///
/// # Errors
/// If it is one.
pub fn check_abi(plugin: &PluginRecord) -> Result<(), Refusal> {
    let abi = plugin
        .abi
        .split_once('.')
        .and_then(|(major, minor)| Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?)));
    // A newer minor may rely on what this host lacks.
    if abi.is_none_or(|(major, minor)| major != ABI_MAJOR || minor > ABI_MINOR) {
        return Err(Refusal::OtherAbi {
            found: plugin.abi.clone(),
        });
    }
    Ok(())
}

/// Refuses a plugin of another target triple.
///
/// # Errors
/// If it is one.
pub fn check_target(plugin: &PluginRecord) -> Result<(), Refusal> {
    let have = moeut_plugin_api::abi::manifest::TARGET;
    if plugin.target != have {
        return Err(Refusal::OtherTarget {
            found: plugin.target.clone(),
            have,
        });
    }
    Ok(())
}

/// Refuses a plugin of another minor version of libtorch.
///
/// # Errors
/// If it is one.
pub fn check_libtorch(plugin: &PluginRecord) -> Result<(), Refusal> {
    let have = moeut_torch::LIBTORCH_VERSION;
    if !plugin.libtorch.is_empty() && minor(&plugin.libtorch) != minor(have) {
        return Err(Refusal::OtherLibtorch {
            found: plugin.libtorch.clone(),
            have,
        });
    }
    Ok(())
}

/// `2.11` of `2.11.0`.
pub(super) fn minor(version: &str) -> String {
    version.splitn(3, '.').take(2).collect::<Vec<_>>().join(".")
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// `task a, model b`, for errors.
pub fn describe(components: impl Iterator<Item = (ComponentKind, String)>) -> String {
    let all: Vec<String> = components
        .map(|(kind, name)| format!("{kind} `{name}`"))
        .collect();
    if all.is_empty() {
        "nothing".to_owned()
    } else {
        all.join(", ")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) const PLUGIN: &str = r#"{"record":"plugin","abi":"1.0","name":"p","version":"0.1.0","libtorch":"","target":"t","profile":"release","git":"","license":"MIT","authors":"a"}"#;

    #[test]
    fn records_parse_and_padding_is_skipped() {
        let section = format!(
            "{PLUGIN}\n\0\0\0{{\"record\":\"component\",\"kind\":\"task\",\"name\":\"x\"}}\n"
        );
        let (plugin, components) = parse_records(section.as_bytes()).unwrap();
        assert_eq!((plugin.name.as_str(), components.len()), ("p", 1));
    }

    #[test]
    fn a_component_is_registered_once() {
        let task = r#"{"record":"component","kind":"task","name":"x"}"#;
        let refusal = parse_records(format!("{PLUGIN}\n{task}\n{task}\n").as_bytes());
        let why = refusal.unwrap_err().to_string();
        assert!(why.ends_with("task `x` is registered twice"), "{why}");
    }

    #[test]
    fn a_manifest_has_one_plugin_record() {
        for section in [
            String::new(),
            format!("{PLUGIN}\n{PLUGIN}\n"),
            "{}".to_owned(),
            "\u{1}x".to_owned(),
        ] {
            assert!(matches!(
                parse_records(section.as_bytes()),
                Err(Refusal::BadManifest(_))
            ));
        }
    }

    #[test]
    fn compatibility_is_by_abi_target_and_libtorch_minor() {
        let record = |change: fn(&mut PluginRecord)| {
            let (mut plugin, _) = parse_records(PLUGIN.as_bytes()).unwrap();
            moeut_plugin_api::abi::manifest::TARGET.clone_into(&mut plugin.target);
            change(&mut plugin);
            check_abi(&plugin)?;
            check_target(&plugin)?;
            check_libtorch(&plugin)
        };
        assert_eq!(record(|_| ()), Ok(()));
        assert_eq!(record(|plugin| plugin.libtorch = "2.11.3".into()), Ok(()));
        for (change, expected) in [
            (
                (|plugin| plugin.abi = "2.0".into()) as fn(&mut PluginRecord),
                "plugin ABI 2.0",
            ),
            (|plugin| plugin.abi = "1.9".into(), "plugin ABI 1.9"),
            (|plugin| plugin.abi = "x".into(), "plugin ABI x"),
            (
                |plugin| plugin.libtorch = "2.12.0".into(),
                "libtorch 2.12.0",
            ),
            (|plugin| plugin.target = "riscv".into(), "built for riscv"),
        ] {
            let refusal = record(change).unwrap_err().to_string();
            assert!(refusal.contains(expected), "{refusal}");
        }
    }

    /// What is opened is what was hashed, and nobody can change it.
    #[test]
    fn the_image_is_of_the_bytes_that_were_hashed() {
        use std::io::Seek;
        let path = std::env::current_exe().unwrap();
        let bytes = std::fs::read(path).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.so");
        std::fs::write(&path, &bytes).unwrap();
        let mut image = image(&path, File::open(&path).unwrap(), &bytes).unwrap();
        std::fs::write(&path, "overwritten in place").unwrap();
        let mut kept = Vec::new();
        image.rewind().unwrap();
        image.read_to_end(&mut kept).unwrap();
        assert!(kept == bytes);
        image.rewind().unwrap();
        assert!(image.write_all(b"x").is_err());
        assert!(image.set_len(0).is_err());
    }

    #[test]
    fn garbage_and_open_doors_are_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.so");
        std::fs::write(&path, b"\x7fELF and then nothing").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(inspect(&path), Err(Refusal::NotALibrary(_))));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o646)).unwrap();
        assert!(matches!(inspect(&path), Err(Refusal::WorldWritable(_))));
        assert!(matches!(
            inspect(&dir.path().join("none.so")),
            Err(Refusal::Unreadable(_))
        ));
    }
}
