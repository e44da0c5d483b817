//! A table as an artifact. W&B's pages read tables from artifacts of the type `run_table`; the file that a row of history
//! names is for older servers.
//!
//! ```text
//! row of history     artifact_path  = wandb-client-artifact://<client id>/<metric>.table.json
//! artifact record    client id, name, digest, manifest { <metric>.table.json: digest, size, place on this machine }
//! ```
//! The file is uploaded from where the run has it, so that a run is to be uploaded from the machine that it was recorded
//! on; elsewhere W&B leaves the artifact out, and uploads the rest.

use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine};
use md5::{Digest, Md5};
use serde_json::{Value, json};

/// A table in a file of the run.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Artifact {
    /// Of the sequence of versions that the tables of one metric are.
    pub(super) name: String,
    /// Names this version before the server has an id for it.
    pub(super) client_id: String,
    /// Names the newest version.
    pub(super) sequence_id: String,
    /// Of the file inside the artifact.
    pub(super) entry: String,
    /// MD5 of the file, base 64.
    pub(super) md5: String,
    pub(super) size: u64,
    /// Below the run's folder `files`.
    pub(super) path: String,
}

impl Artifact {
    /// The table of a metric, which is in a file; `draw` makes ids of 128 letters and digits.
    pub(super) fn new(
        run: &str,
        metric: &str,
        (path, bytes): (&str, &[u8]),
        draw: impl Fn() -> String,
    ) -> Self {
        Self {
            name: name(&format!("run-{run}-{metric}")),
            client_id: draw(),
            sequence_id: draw(),
            entry: format!("{metric}.table.json"),
            md5: BASE64_STANDARD.encode(Md5::digest(bytes)),
            size: bytes.len() as u64,
            path: path.to_owned(),
        }
    }

    /// What the artifact as a whole is told by, hexadecimal.
    pub(super) fn digest(&self) -> String {
        let Self { entry, md5, .. } = self;
        let manifest = format!("wandb-artifact-manifest-v1\n{entry}:{md5}\n");
        format!("{:x}", Md5::digest(manifest))
    }

    /// What a row of history says about it beside the file.
    pub(super) fn references(&self) -> [(&'static str, Value); 3] {
        let (client, sequence, entry) = (&self.client_id, &self.sequence_id, &self.entry);
        let address = |version: String| json!(format!("wandb-client-artifact://{version}/{entry}"));
        [
            ("artifact_path", address(client.clone())),
            (
                "_latest_artifact_path",
                address(format!("{sequence}:latest")),
            ),
            ("log_mode", json!("IMMUTABLE")),
        ]
    }
}

/// The characters that names of artifacts may have; a checksum tells those apart that differ in others.
fn name(name: &str) -> String {
    let is_allowed = |c: &char| c.is_ascii_alphanumeric() || "_-.".contains(*c);
    let kept: String = name.chars().filter(is_allowed).collect();
    if kept == name {
        return kept;
    }
    let checksum = crc32fast::hash(name.as_bytes()).to_be_bytes();
    format!("{kept}-{}", BASE64_URL_SAFE_NO_PAD.encode(checksum))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `wandb.Table` of version 0.31.0 makes in the run `tab1` of a table of the same bytes.
    #[test]
    fn names_and_digests_are_those_of_wandbs_own_library() {
        let artifact = Artifact {
            md5: "a81bTkYjlN3MmfLynEgyUQ==".to_owned(),
            ..Artifact::new("tab1", "examples/all", ("path", b""), String::new)
        };
        assert_eq!(artifact.name, "run-tab1-examplesall-zeNEtw");
        assert_eq!(artifact.entry, "examples/all.table.json");
        assert_eq!(artifact.digest(), "8831eb3ed69db6f2e9dbe3d87040e788");
        assert_eq!(name("run-tab1-a_b-c.d"), "run-tab1-a_b-c.d");
    }

    #[test]
    fn the_digest_of_a_file_is_its_md5() {
        let artifact = Artifact::new("r", "m", ("media/table/m.table.json", b"abc"), String::new);
        // `printf abc | openssl md5 -binary | base64`
        assert_eq!(artifact.md5, "kAFQmDzST7DWlj99KOF/cg==");
        assert_eq!(artifact.size, 3);
    }
}
