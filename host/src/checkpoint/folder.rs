//! One checkpoint folder: written so that it is either whole or absent, and checked when it is read.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{CheckpointError, Loaded, Snapshot, read_tensors, write_tensors};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const ARGS: &str = "args.json";
const FILES: [&str; 4] = [MODEL, OPTIMIZER, STATE, ARGS];
const MANIFEST: &str = "MANIFEST.json";

const PREFIX: &str = "model-";
/// A leading dot hides unfinished folders from `ls` and from the search for checkpoints.
const TEMPORARY_PREFIX: &str = ".tmp-model-";
/// Of a folder that was moved aside for a newer save of its step.
const REPLACED_SUFFIX: &str = "-replaced";
/// A manifest has four entries; more than this is not one.
const MAX_MANIFEST_BYTES: u64 = 1 << 20;

/// What [`write()`] promises about the files of a folder.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    step: u64,
    /// Seconds since 1970. Kept here because copying a folder changes the times of its files.
    saved_at: u64,
    files: BTreeMap<String, FileEntry>,
    /// Checksum of the three above: a wrong `step` would be believed otherwise.
    sha256: String,
}

impl Manifest {
    fn new(step: u64, saved_at: u64, files: BTreeMap<String, FileEntry>) -> Self {
        let mut manifest = Self {
            step,
            saved_at,
            files,
            sha256: String::new(),
        };
        manifest.sha256 = manifest.checksum();
        manifest
    }

    fn checksum(&self) -> String {
        let text = pretty(&(self.step, self.saved_at, &self.files));
        format!("{:x}", Sha256::digest(text))
    }
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileEntry {
    bytes: u64,
    sha256: String,
}

/// Writes `snapshot` below `dir` and returns its folder.
pub(super) fn write(
    dir: &Path,
    snapshot: &Snapshot,
    now: SystemTime,
) -> Result<PathBuf, CheckpointError> {
    fs::create_dir_all(dir).map_err(CheckpointError::io("create", dir))?;
    let temporary = dir.join(format!(
        "{TEMPORARY_PREFIX}{}-{}",
        snapshot.step,
        std::process::id()
    ));
    let written = write_files(&temporary, snapshot, now).and_then(|()| {
        // Read back before it takes anything's place. From memory mostly, so that this finds our errors, not the disk's.
        verify_all(&temporary)?;
        let path = dir.join(format!("{PREFIX}{}", snapshot.step));
        move_into_place(&temporary, &path)?;
        sync_dir(dir)?;
        Ok(path)
    });
    if written.is_err() {
        // Half a checkpoint is of no use, and the space may be what was missing. If this fails too, the next start
        // removes it.
        let _ = fs::remove_dir_all(&temporary);
    }
    written
}

fn write_files(folder: &Path, snapshot: &Snapshot, now: SystemTime) -> Result<(), CheckpointError> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(CheckpointError::io("remove", folder))?;
    }
    fs::create_dir(folder).map_err(CheckpointError::io("create", folder))?;

    let tensors = |named| move |out: &mut dyn Write, path: &Path| write_tensors(out, path, named);
    let state = pretty(&snapshot.state);
    let args = pretty(&snapshot.args);
    let mut files = BTreeMap::new();
    let mut add = |name: &str, fill: &Fill| -> Result<(), CheckpointError> {
        files.insert(name.to_owned(), write_file(&folder.join(name), fill)?);
        Ok(())
    };
    add(MODEL, &tensors(&snapshot.model))?;
    add(OPTIMIZER, &tensors(&snapshot.optimizer))?;
    add(STATE, &text(&state))?;
    add(ARGS, &text(&args))?;

    let saved_at = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let manifest = Manifest::new(snapshot.step, saved_at, files);
    write_file(&folder.join(MANIFEST), &text(&pretty(&manifest)))?;
    sync_dir(folder)
}

type Fill<'a> = dyn Fn(&mut dyn Write, &Path) -> Result<(), CheckpointError> + 'a;

fn text(text: &str) -> impl Fn(&mut dyn Write, &Path) -> Result<(), CheckpointError> {
    move |out, path| {
        out.write_all(text.as_bytes())
            .map_err(CheckpointError::io("write", path))
    }
}

fn pretty(value: &impl Serialize) -> String {
    // Values, string maps and the manifest have string keys only, and nothing else can fail.
    serde_json::to_string_pretty(value).unwrap_or_default()
}

fn write_file(path: &Path, fill: &Fill) -> Result<FileEntry, CheckpointError> {
    let io = || CheckpointError::io("write", path);
    let created = File::create(path).map_err(io())?;
    let mut out = Hashing {
        inner: BufWriter::with_capacity(1 << 20, created),
        hash: Sha256::new(),
        bytes: 0,
    };
    fill(&mut out, path)?;
    out.flush().map_err(io())?;
    out.inner.get_ref().sync_all().map_err(io())?;
    Ok(FileEntry {
        bytes: out.bytes,
        sha256: format!("{:x}", out.hash.finalize()),
    })
}

/// Computes the checksum of what passes through.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let n_written = self.inner.write(data)?;
        self.hash.update(&data[..n_written]);
        self.bytes += n_written as u64;
        Ok(n_written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// Renames `temporary` to `path`. A folder that is already there is an older save of the same step, damaged perhaps:
/// it is moved aside first, because a rename does not replace a folder that has files.
fn move_into_place(temporary: &Path, path: &Path) -> Result<(), CheckpointError> {
    let mut aside = temporary.as_os_str().to_owned();
    aside.push(REPLACED_SUFFIX);
    let aside = PathBuf::from(aside);
    let replaces = path.exists();
    if replaces {
        fs::rename(path, &aside).map_err(CheckpointError::io("rename", path))?;
    }
    let moved = fs::rename(temporary, path).map_err(CheckpointError::io("rename", temporary));
    if moved.is_err() && replaces {
        // If this fails too, the next start does it.
        let _ = fs::rename(&aside, path);
    }
    moved?;
    if replaces {
        fs::remove_dir_all(&aside).map_err(CheckpointError::io("remove", &aside))?;
    }
    Ok(())
}

fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(CheckpointError::io("sync", dir))
}

/// Deletes a checkpoint. It is renamed first: if the process is killed meanwhile, the next start removes the rest
/// instead of taking it for a damaged checkpoint.
pub(super) fn remove(path: &Path) -> Result<(), CheckpointError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let expired = path.with_file_name(format!(".tmp-{name}-{}-expired", std::process::id()));
    fs::rename(path, &expired).map_err(CheckpointError::io("rename", path))?;
    fs::remove_dir_all(&expired).map_err(CheckpointError::io("remove", &expired))
}

/// Removes what a killed process left behind. A failure is not worth a message: the next save names its cause.
pub(super) fn remove_leftovers(dir: &Path) {
    put_back(dir);
    for (_, path) in leftovers(dir) {
        let _ = fs::remove_dir_all(path);
    }
}

/// Names and paths of unfinished folders.
fn leftovers(dir: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, entry.path())
        })
        .filter(|(name, _)| name.starts_with(TEMPORARY_PREFIX))
        .collect()
}

/// A process that was killed between the two renames of [`move_into_place`] left a good checkpoint under the name of an
/// unfinished one.
fn put_back(dir: &Path) {
    for (name, path) in leftovers(dir) {
        let step = name
            .strip_prefix(TEMPORARY_PREFIX)
            .filter(|_| name.ends_with(REPLACED_SUFFIX))
            .and_then(|rest| rest.split('-').next());
        if let Some(step) = step {
            let place = dir.join(format!("{PREFIX}{step}"));
            if !place.exists() {
                let _ = fs::rename(&path, place);
            }
        }
    }
}

/// Steps and paths of the folders named `model-<step>` below `dir`, the newest first, whole or not.
pub(super) fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(CheckpointError::io("read", dir)(error)),
    };
    let mut found: Vec<(u64, PathBuf)> = entries
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| {
            let name = entry.file_name();
            let step = name.to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
            Some((step, entry.path()))
        })
        .collect();
    found.sort_unstable_by_key(|&(step, _)| std::cmp::Reverse(step));
    Ok(found)
}

/// How long ago the folder was written; nothing if it has no manifest.
pub(super) fn age(folder: &Path, now: SystemTime) -> Option<Duration> {
    let manifest = read_manifest(folder).ok()?;
    let saved_at = UNIX_EPOCH.checked_add(Duration::from_secs(manifest.saved_at))?;
    Some(now.duration_since(saved_at).unwrap_or_default())
}

/// Reads `path`: a checkpoint folder, or a folder of checkpoints, of which the newest whole one is taken, or a run's
/// folder, which has those in `checkpoint`.
///
/// # Errors
/// [`CheckpointError::Corrupt`] if `path` is a checkpoint that is damaged; [`CheckpointError::None`] or
/// [`CheckpointError::AllUnusable`] if it holds none that can be used.
pub(super) fn load(path: &Path) -> Result<Loaded, CheckpointError> {
    // Not by `args.json`, which a run's folder has as well.
    let own_files = [MANIFEST, MODEL, OPTIMIZER, STATE];
    if own_files.iter().any(|name| path.join(name).exists()) {
        return Ok(Loaded {
            snapshot: read(path)?,
            path: path.to_owned(),
            warnings: Vec::new(),
        });
    }
    let none = |why: &str| CheckpointError::None {
        path: path.to_owned(),
        why: why.to_owned(),
    };
    match fs::metadata(path) {
        Err(error) => return Err(none(&error.to_string())),
        Ok(found) if !found.is_dir() => return Err(none("it is a file")),
        Ok(_) => {}
    }
    let below = path.join("checkpoint");
    let dir = if below.is_dir() { &below } else { path };
    load_latest(dir)?.ok_or_else(|| none("it has no folder named `model-<step>`"))
}

/// The newest whole checkpoint below `dir`, or nothing if there is none at all: what a run asks for when it starts.
///
/// # Errors
/// [`CheckpointError::AllUnusable`] if there are checkpoints, but each is damaged. Starting afresh would then throw
/// work away without asking.
pub fn load_latest(dir: &Path) -> Result<Option<Loaded>, CheckpointError> {
    put_back(dir);
    let mut reasons = Vec::new();
    for (_, path) in list(dir)? {
        match read(&path) {
            Ok(snapshot) => {
                let warnings = reasons
                    .into_iter()
                    .map(|reason| format!("{reason}; using the earlier `{}`", path.display()))
                    .collect();
                return Ok(Some(Loaded {
                    snapshot,
                    path,
                    warnings,
                }));
            }
            Err(error) => reasons.push(error.to_string()),
        }
    }
    if reasons.is_empty() {
        return Ok(None);
    }
    Err(CheckpointError::AllUnusable {
        path: dir.to_owned(),
        reasons,
    })
}

fn read(folder: &Path) -> Result<Snapshot, CheckpointError> {
    let manifest = verify_all(folder)?;
    Ok(Snapshot {
        step: manifest.step,
        model: read_tensors(&folder.join(MODEL))?,
        optimizer: read_tensors(&folder.join(OPTIMIZER))?,
        state: read_json(&folder.join(STATE))?,
        args: read_json(&folder.join(ARGS))?,
    })
}

/// Compares every file with the manifest, which it returns.
fn verify_all(folder: &Path) -> Result<Manifest, CheckpointError> {
    let manifest = read_manifest(folder)?;
    for name in FILES {
        let path = folder.join(name);
        let Some(expected) = manifest.files.get(name) else {
            let why = format!("it does not list `{name}`");
            return Err(CheckpointError::corrupt(&folder.join(MANIFEST), why));
        };
        verify(&path, expected)?;
    }
    Ok(manifest)
}

fn read_manifest(folder: &Path) -> Result<Manifest, CheckpointError> {
    let path = folder.join(MANIFEST);
    let file = open(&path)?;
    let mut text = Vec::new();
    file.take(MAX_MANIFEST_BYTES)
        .read_to_end(&mut text)
        .map_err(CheckpointError::io("read", &path))?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|error| CheckpointError::corrupt(&path, error.to_string()))?;
    if manifest.sha256 == manifest.checksum() {
        return Ok(manifest);
    }
    let why = "its checksum is not that of its entries";
    Err(CheckpointError::corrupt(&path, why))
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    let text = fs::read(path).map_err(CheckpointError::io("read", path))?;
    serde_json::from_slice(&text).map_err(|error| CheckpointError::corrupt(path, error.to_string()))
}

/// Sizes first: a torn file then costs no pass over the data.
fn verify(path: &Path, expected: &FileEntry) -> Result<(), CheckpointError> {
    let io = || CheckpointError::io("read", path);
    let mut file = open(path)?;
    let bytes = file.metadata().map_err(io())?.len();
    if bytes != expected.bytes {
        let why = format!("it has {bytes} bytes, {} were written", expected.bytes);
        return Err(CheckpointError::corrupt(path, why));
    }
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(io())? {
            0 => break,
            n_read => hash.update(&buffer[..n_read]),
        }
    }
    let sha256 = format!("{:x}", hash.finalize());
    if sha256 == expected.sha256 {
        return Ok(());
    }
    let why = format!(
        "its SHA-256 is {}…, {}… was written",
        short(&sha256),
        short(&expected.sha256)
    );
    Err(CheckpointError::corrupt(path, why))
}

fn short(hex: &str) -> &str {
    hex.get(..12).unwrap_or(hex)
}

/// A missing file is damage, and not a failure of the file system.
fn open(path: &Path) -> Result<File, CheckpointError> {
    File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => CheckpointError::corrupt(path, "it is missing"),
        _ => CheckpointError::io("read", path)(error),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;
    use tch::Tensor;

    pub(in crate::checkpoint) fn snapshot(step: u64) -> Snapshot {
        let value = f64::from(u32::try_from(step).unwrap());
        Snapshot {
            step,
            model: vec![("layer.w".to_owned(), Tensor::from_slice(&[value, 0.1]))],
            optimizer: vec![
                (
                    "step".to_owned(),
                    Tensor::from(i64::try_from(step).unwrap()),
                ),
                ("rng".to_owned(), Tensor::from_slice(&[7u8; 5000])),
            ],
            state: json!({"rng": "00ff", "best_loss": 0.1 + 0.2, "tokens": u64::MAX}),
            args: BTreeMap::from([("lr".to_owned(), "0.1".to_owned())]),
        }
    }

    fn write_steps(dir: &Path, steps: &[u64]) {
        for &step in steps {
            write(dir, &snapshot(step), UNIX_EPOCH).unwrap();
        }
    }

    #[test]
    fn everything_comes_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        write_steps(dir.path(), &[20, 100]);
        let loaded = load(dir.path()).unwrap();
        let expected = snapshot(100);
        assert_eq!(loaded.path, dir.path().join("model-100"));
        assert_eq!(loaded.snapshot.step, 100);
        assert!(loaded.snapshot.model[0].1.equal(&expected.model[0].1));
        assert_eq!(loaded.snapshot.optimizer[0].0, "step");
        assert!(
            loaded.snapshot.optimizer[1]
                .1
                .equal(&expected.optimizer[1].1)
        );
        assert_eq!(loaded.snapshot.state, expected.state);
        assert_eq!(loaded.snapshot.args, expected.args);
        assert!(loaded.warnings.is_empty());

        let one = load(&dir.path().join("model-20")).unwrap();
        assert_eq!(one.snapshot.step, 20);

        let run = tempfile::tempdir().unwrap();
        fs::write(run.path().join(ARGS), "{}").unwrap();
        write_steps(&run.path().join("checkpoint"), &[3]);
        assert_eq!(load(run.path()).unwrap().snapshot.step, 3);
    }

    /// Damages the newer of two checkpoints, and returns the warning with which the earlier one loads.
    fn warning_after(damage: impl Fn(&Path)) -> String {
        let dir = tempfile::tempdir().unwrap();
        write_steps(dir.path(), &[5, 6]);
        damage(&dir.path().join("model-6"));
        let loaded = load(dir.path()).unwrap();
        assert_eq!(loaded.snapshot.step, 5);
        assert_eq!(loaded.warnings.len(), 1);
        let root = dir.path().display().to_string();
        loaded.warnings[0].replace(&root, "")
    }

    #[test]
    fn a_damaged_checkpoint_gives_way_to_the_one_before_it() {
        let truncated = warning_after(|folder| {
            let file = File::options()
                .write(true)
                .open(folder.join(OPTIMIZER))
                .unwrap();
            file.set_len(100).unwrap();
        });
        assert!(
            truncated
                .starts_with("`/model-6/optimizer.safetensors` is damaged: it has 100 bytes, 5"),
            "{truncated}"
        );
        assert!(
            truncated.ends_with("using the earlier `/model-5`"),
            "{truncated}"
        );

        let flipped = warning_after(|folder| {
            let path = folder.join(MODEL);
            let mut bytes = fs::read(&path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&path, bytes).unwrap();
        });
        assert!(
            flipped.starts_with("`/model-6/model.safetensors` is damaged: its SHA-256 is "),
            "{flipped}"
        );

        let missing = warning_after(|folder| fs::remove_file(folder.join(STATE)).unwrap());
        assert!(missing.starts_with("`/model-6/state.json` is damaged: it is missing"));

        let no_manifest = warning_after(|folder| fs::remove_file(folder.join(MANIFEST)).unwrap());
        assert!(no_manifest.starts_with("`/model-6/MANIFEST.json` is damaged: it is missing"));

        let torn_manifest = warning_after(|folder| fs::write(folder.join(MANIFEST), "{").unwrap());
        assert!(torn_manifest.starts_with("`/model-6/MANIFEST.json` is damaged: EOF"));
    }

    /// A bit of every byte of the manifest, which alone says what is right, and of some bytes of the others.
    #[test]
    fn flipped_bits_and_missing_bytes_are_found() {
        let dir = tempfile::tempdir().unwrap();
        write_steps(dir.path(), &[6]);
        let folder = dir.path().join("model-6");
        for name in FILES.into_iter().chain([MANIFEST]) {
            let path = folder.join(name);
            let good = fs::read(&path).unwrap();
            let stride = if name == MANIFEST { 1 } else { 41 };
            for at in (0..good.len()).step_by(stride) {
                let mut bytes = good.clone();
                bytes[at] ^= 1 << (at % 8);
                fs::write(&path, bytes).unwrap();
                assert!(read(&folder).is_err(), "byte {at} of {name}");
            }
            for length in [0, 1, good.len() / 2, good.len() - 1] {
                fs::write(&path, &good[..length]).unwrap();
                assert!(read(&folder).is_err(), "{name} cut to {length} bytes");
            }
            fs::write(&path, good).unwrap();
        }
        assert_eq!(read(&folder).unwrap().step, 6);

        let path = folder.join(MANIFEST);
        let manifest = fs::read_to_string(&path).unwrap();
        fs::write(&path, manifest.replace("\"step\": 6", "\"step\": 7")).unwrap();
        let error = read(&folder).unwrap_err().to_string();
        assert!(
            error.ends_with("its checksum is not that of its entries"),
            "{error}"
        );
    }

    #[test]
    fn files_of_another_checkpoint_are_found() {
        for name in FILES.into_iter().chain([MANIFEST]) {
            let dir = tempfile::tempdir().unwrap();
            write_steps(dir.path(), &[5]);
            let mut later = snapshot(6);
            later.state = json!({"tokens": 6});
            later.args.insert("lr".to_owned(), "0.2".to_owned());
            write(dir.path(), &later, UNIX_EPOCH).unwrap();
            let [older, newer] =
                ["model-5", "model-6"].map(|folder| dir.path().join(folder).join(name));
            let [a, b] = [&older, &newer].map(|path| fs::read(path).unwrap());
            assert!(a != b, "{name} says nothing of the step");
            fs::write(older, b).unwrap();
            fs::write(newer, a).unwrap();
            let error = load_latest(dir.path()).unwrap_err();
            assert!(
                matches!(error, CheckpointError::AllUnusable { .. }),
                "{name}: {error}"
            );
        }
    }

    #[test]
    fn a_process_killed_while_it_replaced_a_checkpoint_lost_neither() {
        let dir = tempfile::tempdir().unwrap();
        write_steps(dir.path(), &[5]);
        let aside = dir.path().join(".tmp-model-5-123-replaced");
        fs::rename(dir.path().join("model-5"), &aside).unwrap();
        assert_eq!(load(dir.path()).unwrap().snapshot.step, 5);

        fs::rename(dir.path().join("model-5"), &aside).unwrap();
        remove_leftovers(dir.path());
        assert_eq!(load(dir.path()).unwrap().snapshot.step, 5);
        assert!(!aside.exists());
    }

    #[test]
    fn a_damaged_checkpoint_that_was_asked_for_by_name_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        write_steps(dir.path(), &[5, 6]);
        fs::write(dir.path().join("model-6").join(ARGS), "{}").unwrap();
        assert!(matches!(
            load(&dir.path().join("model-6")),
            Err(CheckpointError::Corrupt { .. })
        ));
    }

    #[test]
    fn nothing_and_only_damage_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load_latest(dir.path()).unwrap().is_none());
        assert!(load_latest(&dir.path().join("absent")).unwrap().is_none());
        let none = load(&dir.path().join("absent")).unwrap_err();
        assert!(matches!(none, CheckpointError::None { .. }), "{none}");

        write_steps(dir.path(), &[5]);
        fs::remove_file(dir.path().join("model-5").join(MODEL)).unwrap();
        let error = load_latest(dir.path()).unwrap_err();
        assert!(
            error.to_string().contains("model.safetensors` is damaged"),
            "{error}"
        );
        assert!(error.help().contains("-reset 1"));
    }

    #[test]
    fn a_folder_that_a_killed_process_left_is_ignored_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        write_steps(dir.path(), &[5]);
        let leftover = dir.path().join(".tmp-model-6-123");
        fs::create_dir(&leftover).unwrap();
        fs::write(leftover.join(MODEL), "half").unwrap();

        let loaded = load(dir.path()).unwrap();
        assert_eq!((loaded.snapshot.step, loaded.warnings.len()), (5, 0));
        remove_leftovers(dir.path());
        assert!(!leftover.exists());
        assert_eq!(list(dir.path()).unwrap().len(), 1);
    }

    #[test]
    fn saving_a_step_again_replaces_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        write_steps(dir.path(), &[5]);
        fs::write(dir.path().join("model-5").join(STATE), "").unwrap();
        write_steps(dir.path(), &[5]);
        assert_eq!(load(dir.path()).unwrap().snapshot.step, 5);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
