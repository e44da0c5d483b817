//! Signatures of packages (Ed25519, RFC 8032) and the keys that a user trusts.
//!
//! A key and a signature are a line of text each, so that they can be mailed, compared and kept in a repository:
//!
//! ```text
//! ed25519 <64 hex digits> ada@example.org          public key; `trusted_keys` has one a line
//! ed25519 <64 hex digits> <128 hex digits>         signature, with the key that made it
//! ```

use crate::plugins::Policy;
use crate::plugins::inspect::hex;
use ed25519_compact as ed25519;
use moeut_plugin_api::PluginError;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const WORD: &str = "ed25519";
const SECRET_WORD: &str = "moeut-secret-ed25519";

/// Whose word a package is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(ed25519::PublicKey);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0[..]))
    }
}

/// A signature that agrees with what it signs.
#[derive(Debug, Clone, Copy)]
pub struct Signature {
    /// Who signed.
    pub key: PublicKey,
    signature: ed25519::Signature,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{WORD} {} {}", self.key, hex(&self.signature[..]))
    }
}

impl Signature {
    /// Reads a line and checks it against what it signs.
    ///
    /// # Errors
    /// If it is none, or not of these bytes.
    pub(super) fn read(line: &[u8], signed: &[u8]) -> Result<Self, String> {
        let malformed = || "its signature is malformed".to_owned();
        let line = std::str::from_utf8(line).map_err(|_| malformed())?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [WORD, key, signature] = words[..] else {
            return Err(malformed());
        };
        let key = bytes(key)
            .map(ed25519::PublicKey::new)
            .ok_or_else(malformed)?;
        let signature = bytes(signature)
            .map(ed25519::Signature::new)
            .ok_or_else(malformed)?;
        key.verify(signed, &signature).map_err(|_| {
            "its signature is not that of its list: somebody changed one of them".to_owned()
        })?;
        Ok(Self {
            key: PublicKey(key),
            signature,
        })
    }
}

/// What signs.
pub struct SecretKey(ed25519::KeyPair);

impl SecretKey {
    /// Makes a key and writes it to `path`, which only its owner may read, and its public half to `<path>.pub`.
    ///
    /// # Errors
    /// If there is such a file already, or the disk refuses.
    pub fn create(path: &Path) -> Result<(PublicKey, PathBuf), PluginError> {
        let mut public_path = path.as_os_str().to_owned();
        public_path.push(".pub");
        let public_path = PathBuf::from(public_path);
        let make = || -> std::io::Result<PublicKey> {
            let mut seed = [0; 32];
            File::open("/dev/urandom")?.read_exact(&mut seed)?;
            let pair = ed25519::KeyPair::from_seed(ed25519::Seed::new(seed));
            let public = PublicKey(pair.pk);
            let mut options = File::options();
            options.write(true).create_new(true).mode(0o600);
            let mut file = options.open(path)?;
            writeln!(file, "{SECRET_WORD} {}", hex(&seed))?;
            file.sync_all()?;
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .open(&public_path)?;
            writeln!(
                file,
                "{WORD} {public} {}",
                path.file_name().unwrap_or_default().display()
            )?;
            file.sync_all()?;
            Ok(public)
        };
        let public = make().map_err(|error| {
            PluginError::new(format!("the key `{}` cannot be made", path.display()))
                .why(error.to_string())
                .fix("name a file that does not exist yet, in a folder of yours")
        })?;
        Ok((public, public_path))
    }

    /// Reads a secret key.
    ///
    /// # Errors
    /// If it cannot be read or is none.
    pub fn read(path: &Path) -> Result<Self, PluginError> {
        let error = |why: String| {
            PluginError::new(format!("the key `{}` cannot be used", path.display()))
                .why(why)
                .fix("name a file that `moeut-host plugins key <file>` made")
        };
        let text = fs::read_to_string(path).map_err(|unreadable| error(unreadable.to_string()))?;
        let words: Vec<&str> = text.split_whitespace().collect();
        let [SECRET_WORD, seed] = words[..] else {
            let why = if words.first() == Some(&WORD) {
                "it is a public key; only the secret one signs"
            } else {
                "it is no secret key"
            };
            return Err(error(why.to_owned()));
        };
        let seed = bytes(seed).ok_or_else(|| error("it is cut off, or not in hex".to_owned()))?;
        Ok(Self(ed25519::KeyPair::from_seed(ed25519::Seed::new(seed))))
    }

    /// Signs. The same bytes always get the same signature.
    pub(super) fn sign(&self, bytes: &[u8]) -> Signature {
        Signature {
            key: PublicKey(self.0.pk),
            signature: self.0.sk.sign(bytes, None),
        }
    }
}

/// Keys whose packages are installed without a word.
#[derive(Debug, Default)]
pub struct TrustedKeys {
    path: PathBuf,
    keys: Vec<(PublicKey, String)>,
}

impl TrustedKeys {
    /// The user's: `$XDG_CONFIG_HOME/moeut/trusted_keys`, by default below `~/.config`. No file is no keys.
    ///
    /// # Errors
    /// If the file cannot be read, or a line is no key.
    pub fn of_user() -> Result<Self, PluginError> {
        let folder = std::env::var_os("XDG_CONFIG_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".config")));
        match folder {
            Some(folder) => Self::read(folder.join("moeut/trusted_keys")),
            None => Ok(Self::default()),
        }
    }

    fn read(path: PathBuf) -> Result<Self, PluginError> {
        let error = |why: String| {
            PluginError::new(format!(
                "the trusted keys `{}` cannot be read",
                path.display()
            ))
            .why(why)
            .fix(format!(
                "each line is `{WORD} <64 hex digits> <whose>`, as in the `.pub` file of a key"
            ))
        };
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(missing) if missing.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(other) => return Err(error(other.to_string())),
        };
        let mut keys = Vec::new();
        let lines = text.lines().enumerate();
        for (index, line) in
            lines.filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'))
        {
            let mut words = line.split_whitespace();
            let key = match (words.next(), words.next().and_then(bytes)) {
                (Some(WORD), Some(key)) => PublicKey(ed25519::PublicKey::new(key)),
                _ => return Err(error(format!("line {} is no key: `{line}`", index + 1))),
            };
            keys.push((key, words.collect::<Vec<_>>().join(" ")));
        }
        Ok(Self { path, keys })
    }

    /// Says whose word something is, or refuses it: `strict` wants a trusted signature, `warn` any or none, `off` does
    /// not look.
    ///
    /// # Errors
    /// If the policy refuses it.
    pub fn judge(
        &self,
        origin: &str,
        signature: Option<Signature>,
        policy: Policy,
    ) -> Result<String, PluginError> {
        let trusted =
            signature.and_then(|signature| self.keys.iter().find(|(key, _)| *key == signature.key));
        let refuse = |why: String, fix: String| {
            Err(PluginError::new(format!("`{origin}` is not installed"))
                .why(why)
                .fix(fix))
        };
        let wants = "`-plugin_verify strict` installs only what a trusted key signed";
        match (signature, trusted, policy) {
            (_, Some((_, whose)), _) => Ok(format!("signed by {whose}")),
            (None, _, Policy::Strict) => refuse(
                format!("it is not signed, and {wants}"),
                "ask its authors for a signed package, or leave out `-plugin_verify`".to_owned(),
            ),
            (Some(signature), None, Policy::Strict) => refuse(
                format!("its key {} is not trusted, and {wants}", signature.key),
                format!(
                    "if it is your colleague's, type `echo '{WORD} {} <whose>' >> {}`",
                    signature.key,
                    self.path.display()
                ),
            ),
            (Some(signature), None, _) => Ok(format!(
                "signed by a key that is not trusted: {}",
                signature.key
            )),
            (None, _, _) => Ok("not signed".to_owned()),
        }
    }
}

/// The bytes that `N` pairs of hex digits mean.
fn bytes<const N: usize>(hex: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if hex.len() != 2 * N || !hex.is_ascii() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_that_of_the_standard() {
        // RFC 8032, section 7.1, test 2: one byte, 0x72.
        let seed = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, format!("{SECRET_WORD} {seed}\n")).unwrap();
        let signature = SecretKey::read(&path).unwrap().sign(&[0x72]);
        assert_eq!(
            signature.to_string(),
            "ed25519 3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c \
             92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00\n"
        );
        assert!(Signature::read(signature.to_string().as_bytes(), &[0x72]).is_ok());
        assert!(Signature::read(signature.to_string().as_bytes(), &[0x73]).is_err());
    }

    #[test]
    fn a_secret_key_is_its_owners_and_never_replaced() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let (public, public_path) = SecretKey::create(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(SecretKey::read(&path).unwrap().sign(b"x").key, public);
        let line = fs::read_to_string(&public_path).unwrap();
        assert_eq!(line, format!("ed25519 {public} key\n"));
        assert!(SecretKey::create(&path).is_err());
        assert!(SecretKey::read(&public_path).is_err());
    }

    #[test]
    fn lines_of_trusted_keys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trusted_keys");
        let key = SecretKey::create(&dir.path().join("ada")).unwrap().0;
        fs::write(&path, format!("# ours\n\ned25519 {key} ada of the team\n")).unwrap();
        let trusted = TrustedKeys::read(path.clone()).unwrap();
        assert_eq!(trusted.keys, [(key, "ada of the team".to_owned())]);
        fs::write(&path, format!("ed25519 {}\n", &key.to_string()[1..])).unwrap();
        assert!(
            TrustedKeys::read(path)
                .unwrap_err()
                .why
                .starts_with("line 1 is no key")
        );
    }
}
