//! A file from the web that is either whole or absent.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use moeut_text::{Hub, TextError, Watch};

/// Makes `path` the file at `url`, unless it is there.
pub(crate) fn fetch(url: &str, path: &Path, watch: Watch<'_>) -> Result<(), TextError> {
    if path.is_file() {
        return Ok(());
    }
    let cannot_write = |source: io::Error| {
        source.downcast().unwrap_or_else(|source| TextError::Io {
            doing: "write",
            path: path.to_owned(),
            source,
        })
    };
    let (host, file) = url
        .match_indices('/')
        .nth(2)
        .map_or((url, ""), |(end, _)| (&url[..end], &url[end + 1..]));
    let hub = Hub {
        endpoint: host.to_owned(),
        token: None,
        ..Hub::from_env()
    };
    let mut source = hub.open(file)?;
    let temporary = path.with_extension("part");
    let copy = || {
        fs::create_dir_all(path.parent().unwrap_or(path))?;
        let mut target = File::create(&temporary)?;
        while io::copy(&mut source.by_ref().take(1 << 20), &mut target)? > 0 {
            watch.check().map_err(io::Error::other)?;
        }
        target.sync_all()?;
        fs::rename(&temporary, path)
    };
    let mut copy = copy;
    copy().map_err(cannot_write)
}
