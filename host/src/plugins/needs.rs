//! What a plugin file needs of other libraries, and whether this program has it.
//!
//! Both sides are read from ELF files: nothing of the plugin runs. The libraries that count are those that this process
//! has mapped, since a plugin shares them, above all the one libtorch.

use object::read::elf::{Dyn, ElfFile64, Sym};
use object::read::{ReadCache, ReadRef};
use object::{Endianness, elf};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

/// What a file asks of others.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Libraries that are loaded with it (`DT_NEEDED`), in its order.
    pub libraries: Vec<String>,
    /// Symbols that others must define; those that may be absent are left out.
    pub symbols: Vec<Symbol>,
}

/// An undefined symbol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symbol {
    /// As the linker knows it, so C++ names are mangled.
    pub name: String,
    /// The library and its version that the symbol was linked with; the libraries of libtorch have no versions.
    pub version: Option<Version>,
}

/// A version of a library's symbols: `GLIBC_2.34` of `libc.so.6`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The library's file name.
    pub library: String,
    /// The version's name.
    pub name: String,
}

impl Needs {
    /// Reads the dynamic section of a 64-bit library.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn read(bytes: &[u8]) -> object::read::Result<Self> {
        let file = ElfFile64::<Endianness>::parse(bytes)?;
        let (endian, sections) = (file.endian(), file.elf_section_table());
        let mut needs = Self::default();
        if let Some((entries, strings)) = sections.dynamic(endian, bytes)? {
            let strings = sections.strings(endian, bytes, strings)?;
            let is_needed = |entry: &&elf::Dyn64<_>| entry.tag32(endian) == Some(elf::DT_NEEDED);
            for entry in entries.iter().filter(is_needed) {
                needs.libraries.push(text(entry.string(endian, strings)?));
            }
        }
        let versions = sections.versions(endian, bytes)?;
        let table = file.elf_dynamic_symbol_table();
        for (index, symbol) in table.enumerate() {
            let name = text(table.symbol_name(endian, symbol)?);
            if name.is_empty() || !symbol.is_undefined(endian) || symbol.st_bind() == elf::STB_WEAK
            {
                continue;
            }
            let version = match &versions {
                Some(versions) => versions.version(versions.version_index(endian, index))?,
                None => None,
            };
            needs.symbols.push(Symbol {
                name,
                version: version.and_then(|version| {
                    Some(Version {
                        library: text(version.file()?),
                        name: text(version.name()),
                    })
                }),
            });
        }
        Ok(needs)
    }
}

/// The shared libraries of this process, by file name.
#[derive(Debug)]
pub struct Here {
    libraries: BTreeMap<String, PathBuf>,
}

/// Where what a file needs was found.
#[derive(Debug, Default)]
pub struct Resolution {
    /// Symbols by the library that has them.
    pub found: BTreeMap<String, Vec<Symbol>>,
    /// Symbols that no library here has.
    pub missing: Vec<String>,
    /// Versions that the library here does not have, each with the newest one of its kind that it has.
    pub too_new: BTreeMap<Version, String>,
    /// Libraries that are no part of this program. The system's loader will look for them, and for missing symbols in
    /// them.
    pub elsewhere: Vec<String>,
}

impl Here {
    /// Reads the memory map of this process.
    pub fn now() -> Self {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let paths = maps
            .lines()
            .filter_map(|line| Some(PathBuf::from(&line[line.find('/')?..])));
        let mut libraries = BTreeMap::new();
        for path in paths {
            let name = path.file_name().and_then(|name| name.to_str());
            let Some((name, _)) = name.and_then(|name| Some((name, name.find(".so")?))) else {
                continue;
            };
            // The map has the file, `libstdc++.so.6.0.30`, and who needs it the link to it, `libstdc++.so.6`.
            let mut name = name.to_owned();
            while name.contains(".so") {
                libraries.insert(name.clone(), path.clone());
                name.truncate(name.rfind('.').unwrap_or_default());
            }
        }
        Self { libraries }
    }

    /// Where a library is, by its file name.
    pub fn path(&self, library: &str) -> Option<&Path> {
        self.libraries.get(library).map(PathBuf::as_path)
    }

    /// Looks for everything that a file needs.
    ///
    /// # Errors
    /// If a library of this process cannot be read.
    pub fn resolve(&self, needs: &Needs) -> std::io::Result<Resolution> {
        let mut resolution = Resolution::default();
        let is_here = |library: &&String| self.libraries.contains_key(*library);
        resolution.elsewhere = needs
            .libraries
            .iter()
            .filter(|library| !is_here(library))
            .cloned()
            .collect();
        let mut unversioned: BTreeMap<&str, &Symbol> = BTreeMap::new();
        let mut versions: BTreeSet<&Version> = BTreeSet::new();
        for symbol in &needs.symbols {
            match &symbol.version {
                None => {
                    unversioned.insert(&symbol.name, symbol);
                }
                Some(version) => {
                    versions.insert(version);
                    let of_library = resolution.found.entry(version.library.clone());
                    of_library.or_default().push(symbol.clone());
                }
            }
        }
        for version in versions {
            let Some(path) = self.libraries.get(&version.library) else {
                continue; // said by `elsewhere`
            };
            let defined = defined_versions(path)?;
            if !defined.contains(&version.name) {
                let newest = newest_like(&version.name, &defined).unwrap_or_default();
                resolution.too_new.insert(version.clone(), newest);
            }
        }
        for (library, path) in needs
            .libraries
            .iter()
            .filter_map(|library| self.libraries.get_key_value(library))
        {
            if unversioned.is_empty() {
                break;
            }
            for name in exported(path, &unversioned)? {
                if let Some(symbol) = unversioned.remove(name.as_str()) {
                    let of_library = resolution.found.entry(library.clone());
                    of_library.or_default().push(symbol.clone());
                }
            }
        }
        resolution.missing = unversioned.into_keys().map(str::to_owned).collect();
        Ok(resolution)
    }
}

impl Resolution {
    /// Why the loader must fail, in words; none if it need not.
    pub fn problem(&self, libtorch: &str) -> Option<String> {
        let mut reasons: Vec<String> = self
            .too_new
            .iter()
            .map(|(version, newest)| {
                format!(
                    "`{}` of `{}`, whose newest here is `{newest}`",
                    version.name, version.library
                )
            })
            .collect();
        if self.elsewhere.is_empty() && !self.missing.is_empty() {
            reasons.push(format!(
                "{} that neither libtorch {libtorch} nor another library here exports: {}",
                counted(self.missing.len(), "symbol"),
                some_of(&self.missing)
            ));
        }
        (!reasons.is_empty()).then(|| format!("it needs {}", reasons.join("; and ")))
    }
}

/// `1 symbol`, `2 symbols`.
pub fn counted(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// The first few of many names.
fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<String> = names
        .iter()
        .take(SHOWN)
        .map(|name| format!("`{name}`"))
        .collect();
    let rest = if names.len() > SHOWN { ", …" } else { "" };
    shown.join(", ") + rest
}

/// Those of `wanted` that a library defines. Of the hundreds of megabytes of libtorch, its symbol table is read.
fn exported(path: &Path, wanted: &BTreeMap<&str, &Symbol>) -> std::io::Result<Vec<String>> {
    let data = ReadCache::new(File::open(path)?);
    let names = || -> object::read::Result<Vec<String>> {
        let file = ElfFile64::<Endianness, _>::parse(&data)?;
        let endian = file.endian();
        let table = file.elf_dynamic_symbol_table();
        let section = file.elf_section_table().section(table.string_section())?;
        let strings = object::read::elf::SectionHeader::data(section, endian, &data)?;
        let defined = table
            .iter()
            .filter(|symbol| !symbol.is_undefined(endian))
            .filter_map(|symbol| {
                let range = u64::from(symbol.st_name(endian))..strings.len() as u64;
                std::str::from_utf8(strings.read_bytes_at_until(range, 0).ok()?).ok()
            });
        Ok(defined
            .filter(|name| wanted.contains_key(name))
            .map(str::to_owned)
            .collect())
    };
    names().map_err(std::io::Error::other)
}

/// Names of the symbol versions that a library defines.
fn defined_versions(path: &Path) -> std::io::Result<BTreeSet<String>> {
    let data = ReadCache::new(File::open(path)?);
    let names = || -> object::read::Result<BTreeSet<String>> {
        let file = ElfFile64::<Endianness, _>::parse(&data)?;
        let (endian, sections) = (file.endian(), file.elf_section_table());
        let mut names = BTreeSet::new();
        let Some((mut definitions, strings)) = sections.gnu_verdef(endian, &data)? else {
            return Ok(names);
        };
        let strings = sections.strings(endian, &data, strings)?;
        while let Some((_, mut auxiliaries)) = definitions.next()? {
            // The first one is its name, the others are its ancestors.
            if let Some(auxiliary) = auxiliaries.next()? {
                names.insert(text(auxiliary.name(endian, strings)?));
            }
        }
        Ok(names)
    };
    names().map_err(std::io::Error::other)
}

/// `GLIBC_2.36` for `GLIBC_2.38`, if that is the newest one.
fn newest_like(wanted: &str, defined: &BTreeSet<String>) -> Option<String> {
    let (family, _) = numbered(wanted)?;
    let of_family = defined.iter().filter_map(|name| {
        let (other, numbers) = numbered(name)?;
        (other == family).then_some((numbers, name))
    });
    of_family.max().map(|(_, name)| name.clone())
}

/// `GLIBC_2.38` is `GLIBC` and `[2, 38]`.
pub fn numbered(version: &str) -> Option<(&str, Vec<u32>)> {
    let (family, numbers) = version.rsplit_once('_')?;
    let numbers = numbers.split('.').map(|number| number.parse().ok());
    Some((family, numbers.collect::<Option<_>>()?))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This very program is linked like a plugin of a model.
    fn own_needs() -> Needs {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        Needs::read(&bytes).unwrap()
    }

    #[test]
    fn a_program_that_runs_lacks_nothing() {
        let needs = own_needs();
        assert!(needs.libraries.iter().any(|name| name == "libtorch_cpu.so"));
        let resolution = Here::now().resolve(&needs).unwrap();
        assert_eq!(resolution.problem("2.11.0"), None, "{resolution:?}");
        assert!(resolution.missing.is_empty(), "{:?}", resolution.missing);
        assert_eq!(resolution.elsewhere, [""; 0]);
        assert!(!resolution.found["libtorch_cpu.so"].is_empty());
        let libc = &resolution.found["libc.so.6"];
        assert!(
            libc.iter().any(|symbol| symbol.name == "malloc"),
            "{libc:?}"
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut needs = own_needs();
        let symbol = |name: &str, version: Option<&str>| Symbol {
            name: name.into(),
            version: version.map(|name| Version {
                library: "libc.so.6".into(),
                name: name.into(),
            }),
        };
        needs.symbols.push(symbol("at_gone", None));
        needs.symbols.push(symbol("dance", Some("GLIBC_2.999")));
        let problem = Here::now().resolve(&needs).unwrap().problem("2.11.0");
        let problem = problem.unwrap();
        assert!(
            problem.starts_with(
                "it needs `GLIBC_2.999` of `libc.so.6`, whose newest here is `GLIBC_2."
            ),
            "{problem}"
        );
        assert!(
            problem.ends_with("library here exports: `at_gone`"),
            "{problem}"
        );

        // A library that is loaded with the plugin may have the symbol.
        needs.libraries.push("libmine.so.1".into());
        needs.symbols.pop();
        let resolution = Here::now().resolve(&needs).unwrap();
        assert_eq!(resolution.elsewhere, ["libmine.so.1"]);
        assert_eq!(resolution.problem("2.11.0"), None);
    }

    #[test]
    fn versions_are_ordered_by_number() {
        let defined = ["GLIBC_2.4", "GLIBC_2.34", "GLIBC_PRIVATE", "OTHER_3"].map(str::to_owned);
        let newest = newest_like("GLIBC_2.38", &BTreeSet::from(defined));
        assert_eq!(newest.as_deref(), Some("GLIBC_2.34"));
    }
}
