//! What is cached and what is made again, and what killed and rival processes leave behind.

use std::cell::{Cell, RefCell};

use sha2::{Digest, Sha256};

use super::*;
use crate::{
    hub::Hub,
    shards::ShardSource,
    testing::{self, Answer, Request, Server, shard_of},
};

const ONE: NonZeroUsize = NonZeroUsize::MIN;

/// A small corpus in a folder, whose shard `i` has `n_documents[i]` documents.
struct Fixture {
    folder: tempfile::TempDir,
    shards: Shards,
    cache: TokenCache,
    tokenizer: Tokenizer,
}

impl Fixture {
    fn new(n_documents: &[usize]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let corpus = Corpus::c4("en");
        for (index, &n) in n_documents.iter().enumerate() {
            let texts: Vec<String> = (0..n).map(testing::sentence).collect();
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            fs::write(
                folder.path().join(corpus.file_name(Split::Train, index)),
                shard_of(&texts),
            )
            .unwrap();
        }
        let shards = ShardSource::Folder(folder.path().to_owned())
            .shards(&corpus, Split::Train)
            .unwrap();
        let tokenizer = Tokenizer::of(testing::tiny_tokenizer());
        let cache = TokenCache::new(
            &folder.path().join("cache"),
            &corpus,
            tokenizer.vocab_size(),
        );
        Self {
            folder,
            shards,
            cache,
            tokenizer,
        }
    }

    fn prepare(&self, limit: Option<u64>, watch: Watch<'_>) -> Result<Vec<Chunk>, TextError> {
        let amount = Amount {
            limit,
            min_chunks: 1,
        };
        self.cache.prepare(
            Split::Train,
            &self.shards,
            &self.tokenizer,
            amount,
            ONE,
            watch,
        )
    }

    fn tokens_per_document(&self) -> u64 {
        self.tokenizer
            .encode(&(testing::sentence(0) + SEPARATOR))
            .unwrap()
            .len() as u64
    }
}

#[test]
fn widths_follow_the_reference() {
    use TokenWidth::{I16, I32, I64, U8};
    for (vocab_size, width) in [
        (255, U8),
        (256, I16),
        (8000, I16),
        (32_766, I16),
        (32_767, I32),
        (2_147_483_646, I32),
        (2_147_483_647, I64),
    ] {
        assert_eq!(
            TokenWidth::for_vocab_size(vocab_size),
            width,
            "{vocab_size}"
        );
    }
    for width in [U8, I16, I32, I64] {
        let mut bytes = Vec::new();
        for id in [0, 1, 127, 200] {
            width.push(id, &mut bytes);
        }
        assert_eq!(width.ids(&bytes).collect::<Vec<_>>(), [0, 1, 127, 200]);
    }
}

#[test]
fn the_amount_grows_by_prediction_and_stops_early() {
    let fixture = Fixture::new(&[10; 8]);
    let per_shard = 10 * fixture.tokens_per_document();
    let n_ready = |limit| fixture.prepare(limit, Watch::nobody()).unwrap().len();
    assert_eq!(n_ready(Some(1)), 1);
    assert_eq!(n_ready(Some(per_shard)), 1);
    assert_eq!(n_ready(Some(2 * per_shard + 1)), 3);
    assert_eq!(n_ready(None), 8);
    assert_eq!(n_ready(Some(1)), 8, "what is there is reused");
}

#[test]
fn prediction_is_the_references() {
    let chunk = |n_tokens| Chunk {
        path: PathBuf::new(),
        n_tokens,
        utf8_bytes: None,
    };
    let needed = |ready: &[Chunk], limit, min_chunks| {
        chunks_needed(
            ready,
            Amount {
                limit: Some(limit),
                min_chunks,
            },
            1024,
        )
    };
    assert_eq!(needed(&[], 1000, 8), 1);
    assert_eq!(needed(&[chunk(100)], 1000, 8), 10);
    assert_eq!(needed(&[chunk(100)], 1001, 8), 11);
    assert_eq!(needed(&[chunk(100)], 200, 8), 8);
    assert_eq!(needed(&[chunk(0)], 200, 1), 2);
    assert_eq!(needed(&[chunk(1)], u64::MAX, 1), 1024);
}

#[test]
fn the_sidecar_counts_documents_and_bytes() {
    let fixture = Fixture::new(&[3]);
    let chunk = fixture.prepare(None, Watch::nobody()).unwrap().remove(0);
    let n_bytes: usize = (0..3).map(|i| testing::sentence(i).len()).sum();
    assert_eq!(chunk.utf8_bytes, Some(n_bytes as u64));
    assert!(
        chunk
            .path
            .ends_with("cache/C4/C4-en-64/tokenized_chunks/train/chunk_0.bin"),
        "{}",
        chunk.path.display()
    );
    assert_eq!(
        fs::read_to_string(chunk.path.with_extension("json")).unwrap(),
        format!(
            "{{\"n_tokens\":{},\"n_documents\":3,\"utf8_bytes\":{n_bytes},\"shard\":\"{}\",\"tokenizer\":\"{}\"}}",
            chunk.n_tokens,
            fixture.shards.fingerprint(0).unwrap(),
            fixture.tokenizer.short_fingerprint().unwrap()
        )
    );
}

#[test]
fn a_torn_chunk_is_made_again_with_a_warning() {
    let fixture = Fixture::new(&[5, 5]);
    let made = fixture.prepare(None, Watch::nobody()).unwrap();
    let good = fs::read(&made[1].path).unwrap();
    fs::write(&made[1].path, &good[..good.len() - 1]).unwrap();
    let news = RefCell::new(Vec::new());
    let again = fixture
        .prepare(
            None,
            Watch {
                progress: &|piece| news.borrow_mut().push(piece),
                is_cancelled: &|| false,
            },
        )
        .unwrap();
    assert_eq!(again, made);
    assert_eq!(fs::read(&made[1].path).unwrap(), good);
    let n_warnings = news
        .borrow()
        .iter()
        .filter(|piece| matches!(piece, Progress::Warning(_)))
        .count();
    assert_eq!(n_warnings, 1, "{news:?}");
}

#[test]
fn an_odd_number_of_bytes_is_torn() {
    let folder = tempfile::tempdir().unwrap();
    let cache = TokenCache::new(folder.path(), &Corpus::c4("en"), 8000);
    create_folder(&cache.split_folder(Split::Train)).unwrap();
    fs::write(cache.chunk_path(Split::Train, 0), [0; 7]).unwrap();
    let fixture = Fixture::new(&[1]);
    let origin = Origin {
        shards: &fixture.shards,
        tokenizer: None,
    };
    let damage = cache.find_chunk(Split::Train, 0, &origin);
    let damage = damage.unwrap().unwrap_err();
    assert!(
        damage.ends_with("has 7 bytes, not a multiple of 2; it is made again"),
        "{damage}"
    );
}

#[test]
fn an_error_keeps_the_finished_chunks_and_leaves_no_rests() {
    let fixture = Fixture::new(&[5, 5, 5]);
    let third = fixture
        .folder
        .path()
        .join(Corpus::c4("en").file_name(Split::Train, 2));
    fs::write(third, testing::gzip(b"{}")).unwrap();
    let error = fixture.prepare(None, Watch::nobody()).unwrap_err();
    assert!(
        matches!(error, TextError::MalformedLine { line: 1, .. }),
        "{error}"
    );
    let chunks = fixture.cache.split_folder(Split::Train);
    let mut names: Vec<_> = fs::read_dir(chunks)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["chunk_0.bin", "chunk_0.json", "chunk_1.bin", "chunk_1.json"]
    );
}

#[test]
fn the_host_can_cancel() {
    let fixture = Fixture::new(&[2000; 4]);
    let n_news = Cell::new(0);
    let watch = Watch {
        progress: &|_| n_news.set(n_news.get() + 1),
        is_cancelled: &|| n_news.get() > 0,
    };
    assert!(matches!(
        fixture.prepare(None, watch),
        Err(TextError::Cancelled)
    ));
    let made = fixture.cache.split_folder(Split::Train);
    let chunks = fs::read_dir(made)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    assert!(
        chunks
            .filter(|path| path.extension().unwrap() == "bin")
            .count()
            < 4
    );
}

/// Golden: ids of both validation sets under the Python package's models, see `expected.json` beside these.
#[test]
fn validation_tokens_are_pythons() {
    let Some(shared) = testing::shared() else {
        return;
    };
    for (text, model) in [
        ("embedded_default_rustdocs", "rustdocs_2000"),
        ("c4_like", "c4_like_8000"),
    ] {
        let fixture = shared.join("fixtures/tokenizer").join(model);
        let expected: serde_json::Value =
            serde_json::from_slice(&fs::read(fixture.join("expected.json")).unwrap()).unwrap();
        let tokenizer = Tokenizer::from_file(&fixture.join("tokenizer.model.model")).unwrap();
        let corpus = Corpus::c4("en");
        let shards = ShardSource::Folder(shared.join("data/lm").join(text))
            .shards(&corpus, Split::Validation)
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let cache = TokenCache::new(folder.path(), &corpus, tokenizer.vocab_size());
        let chunks = cache
            .prepare(
                Split::Validation,
                &shards,
                &tokenizer,
                Amount::default(),
                ONE,
                Watch::nobody(),
            )
            .unwrap();
        let hash = Sha256::digest(fs::read(&chunks[0].path).unwrap());
        assert_eq!(
            format!("{hash:x}"),
            expected["sha256_int16_le"].as_str().unwrap(),
            "{model}"
        );
        assert_eq!(chunks[0].n_tokens, expected["n_tokens"].as_u64().unwrap());
    }
}

#[test]
fn threads_change_nothing() {
    let fixture = Fixture::new(&[7, 300, 0, 20, 1, 50]);
    let other = TokenCache::new(&fixture.folder.path().join("other"), &Corpus::c4("en"), 64);
    let amount = Amount::default();
    let three = NonZeroUsize::new(3).unwrap();
    let parallel = other
        .prepare(
            Split::Train,
            &fixture.shards,
            &fixture.tokenizer,
            amount,
            three,
            Watch::nobody(),
        )
        .unwrap();
    let serial = fixture.prepare(None, Watch::nobody()).unwrap();
    for (a, b) in parallel.iter().zip(&serial) {
        assert_eq!(fs::read(&a.path).unwrap(), fs::read(&b.path).unwrap());
        assert_eq!(a.utf8_bytes, b.utf8_bytes);
    }
}

fn names(folder: &Path) -> Vec<String> {
    crate::folder::names_in(folder).unwrap()
}

/// Warnings of one preparation.
fn warnings(fixture: &Fixture) -> Vec<String> {
    let news = RefCell::new(Vec::new());
    let tell = |piece| {
        if let Progress::Warning(text) = piece {
            news.borrow_mut().push(text);
        }
    };
    let watch = Watch {
        progress: &tell,
        is_cancelled: &|| false,
    };
    fixture.prepare(None, watch).unwrap();
    news.into_inner()
}

/// Another file among those of a folder moves the ones behind it to other chunks.
#[test]
fn chunks_of_files_that_changed_are_made_again() {
    let mut fixture = Fixture::new(&[3, 4, 5]);
    let sizes = |fixture: &Fixture| -> Vec<u64> {
        let chunks = fixture.prepare(None, Watch::nobody()).unwrap();
        chunks.iter().map(|chunk| chunk.n_tokens).collect()
    };
    let first = sizes(&fixture);
    let corpus = Corpus::c4("en");
    let second = fixture
        .folder
        .path()
        .join(corpus.file_name(Split::Train, 1));
    fs::remove_file(second).unwrap();
    let source = ShardSource::Folder(fixture.folder.path().to_owned());
    fixture.shards = source.shards(&corpus, Split::Train).unwrap();
    let warnings = warnings(&fixture);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].contains("chunk_1.bin` was made from other files than are there"),
        "{warnings:?}"
    );
    assert_eq!(sizes(&fixture), [first[0], first[2]]);
}

#[test]
fn chunks_of_another_tokenizer_are_made_again() {
    let mut fixture = Fixture::new(&[3]);
    assert!(warnings(&fixture).is_empty());
    assert!(warnings(&fixture).is_empty());
    fixture.tokenizer = fixture.tokenizer.renamed("another");
    let warnings = warnings(&fixture);
    assert!(
        warnings[0].contains("was made by another tokenizer than is there"),
        "{warnings:?}"
    );
}

/// The reference's chunks of a published corpus have no sidecar; they are used as they are.
#[test]
fn the_references_cache_is_used_and_asks_nobody() {
    let server = Server::start(|_, _| Answer::status(500));
    let folder = tempfile::tempdir().unwrap();
    let split_folder = folder
        .path()
        .join("PES2O/PES2O-v2-8000/tokenized_chunks/validation");
    fs::create_dir_all(&split_folder).unwrap();
    for (name, ids) in [
        ("chunk_0.bin", vec![5i16; 30]),
        ("chunk_1.bin", vec![7; 20]),
    ] {
        let bytes: Vec<u8> = ids.into_iter().flat_map(i16::to_le_bytes).collect();
        fs::write(split_folder.join(name), bytes).unwrap();
    }
    let corpus = Corpus::pes2o("v2");
    let shards = web(&server.hub(), folder.path())
        .shards(&corpus, Split::Validation)
        .unwrap();
    let cache = TokenCache::new(folder.path(), &corpus, 8000);
    let tokenizer = Tokenizer::of(testing::tiny_tokenizer());
    let chunks = cache.prepare(
        Split::Validation,
        &shards,
        &tokenizer,
        Amount::default(),
        ONE,
        Watch::nobody(),
    );
    let found: Vec<_> = chunks
        .unwrap()
        .into_iter()
        .map(|chunk| (chunk.n_tokens, chunk.utf8_bytes))
        .collect();
    assert_eq!(found, [(30, None), (20, None)]);
    assert!(server.paths().is_empty());
}

fn web(hub: &Hub, raw: &Path) -> ShardSource {
    ShardSource::Web {
        hub: hub.clone(),
        base: None,
        raw: raw.to_owned(),
    }
}

/// A published shard of a hub: 10 documents.
fn published(request: &Request) -> Answer {
    let texts: Vec<String> = (0..10).map(testing::sentence).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    Answer::file(request, &shard_of(&texts), "\"a\"")
}

fn prepare_web(
    hub: &Hub,
    folder: &Path,
    limit: u64,
    n_threads: usize,
) -> Result<Vec<Chunk>, TextError> {
    let corpus = Corpus::c4("en");
    let shards = web(hub, folder).shards(&corpus, Split::Train)?;
    let tokenizer = Tokenizer::of(testing::tiny_tokenizer());
    let amount = Amount {
        limit: Some(limit),
        min_chunks: 1,
    };
    TokenCache::new(folder, &corpus, 64).prepare(
        Split::Train,
        &shards,
        &tokenizer,
        amount,
        NonZeroUsize::new(n_threads).unwrap(),
        Watch::nobody(),
    )
}

#[test]
fn a_limit_stops_the_download_early() {
    let server = Server::start(|request, _| published(request));
    let folder = tempfile::tempdir().unwrap();
    let tokens = prepare_web(&server.hub(), folder.path(), 1, 1).unwrap()[0].n_tokens;
    let chunks = prepare_web(&server.hub(), folder.path(), 3 * tokens, 2).unwrap();
    assert_eq!(chunks.len(), 3);
    let mut paths = server.paths();
    paths.sort();
    let expected: Vec<String> = (0..3)
        .map(|i| {
            let corpus = Corpus::c4("en");
            format!(
                "/{}/en/{}",
                corpus.hub_path,
                corpus.file_name(Split::Train, i)
            )
        })
        .collect();
    assert_eq!(paths, expected, "1024 shards are there");
    let raw = names(folder.path());
    assert_eq!(raw, ["C4"], "raw text is not stored");
}

/// What a server may do to a stream: nothing wrong is ever cached.
#[test]
fn a_server_that_fails_leaves_whole_chunks_only() {
    type Case = (fn(&Request) -> Answer, fn(&TextError) -> bool);
    let answers: [Case; 5] = [
        (
            |_| Answer::status(404),
            |error| matches!(error, TextError::HttpStatus { status: 404, .. }),
        ),
        (
            |_| Answer::status(429).with("Retry-After", "0"),
            |error| matches!(error, TextError::Network { reason, .. } if reason.contains("429")),
        ),
        (
            |_| Answer::status(500),
            |error| matches!(error, TextError::Network { attempts: 3, .. }),
        ),
        (
            |request| match request.start() {
                0 => published(request).cut(50),
                _ => Answer::status(503),
            },
            |error| matches!(error, TextError::Network { .. }),
        ),
        (
            |request| Answer::whole(&published(request).body[..50]),
            |error| matches!(error, TextError::BrokenShard { .. }),
        ),
    ];
    for (answer, is_expected) in answers {
        let server = Server::start(move |request, _| {
            if request.path.contains("train.00001") {
                answer(request)
            } else {
                published(request)
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let error = prepare_web(&server.hub(), folder.path(), 1_000_000, 1).unwrap_err();
        assert!(is_expected(&error), "{error}");
        let chunks = folder.path().join("C4/C4-en-64/tokenized_chunks/train");
        assert_eq!(names(&chunks), ["chunk_0.bin", "chunk_0.json"]);
    }
}

/// The file becomes another one while it is read: the rest of it must not follow the beginning of the other.
#[test]
fn a_file_that_changes_in_the_middle_is_an_error() {
    let server = Server::start(|request, n_before| {
        let tag = if n_before == 0 { "\"a\"" } else { "\"b\"" };
        let answer = Answer::file(request, &shard_of(&[&testing::sentence(n_before)]), tag);
        if n_before == 0 {
            answer.cut(50)
        } else {
            answer
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let error = prepare_web(&server.hub(), folder.path(), 1, 1).unwrap_err();
    assert!(
        matches!(error, TextError::FileChanged { position: 50, .. }),
        "{error}"
    );
}

/// Bytes of all files of a cache by their names.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let chunks = folder.join("C4/C4-en-64/tokenized_chunks/train");
    names(&chunks)
        .into_iter()
        .map(|name| {
            let bytes = fs::read(chunks.join(&name)).unwrap();
            (name, bytes)
        })
        .collect()
}

/// What a run that nobody disturbs makes of `n` shards.
fn undisturbed(n: u64) -> Vec<(String, Vec<u8>)> {
    let server = Server::start(|request, _| published(request));
    let folder = tempfile::tempdir().unwrap();
    let tokens = prepare_web(&server.hub(), folder.path(), 1, 1).unwrap()[0].n_tokens;
    prepare_web(&server.hub(), folder.path(), n * tokens, 1).unwrap();
    contents(folder.path())
}

/// Arguments of a child process.
fn child_args() -> (Hub, PathBuf) {
    let hub = Hub {
        endpoint: std::env::var("MOEUT_TEXT_HUB").unwrap(),
        token: None,
        is_offline: false,
        max_attempts: 1000,
        first_pause: Duration::from_millis(1),
    };
    (hub, std::env::var_os("MOEUT_TEXT_CACHE").unwrap().into())
}

fn child(test: &str, server: &Server, cache: &Path) -> std::process::Command {
    let mut command = testing::child_of(&format!("token_cache::tests::{test}"));
    command
        .env("MOEUT_TEXT_HUB", server.url())
        .env("MOEUT_TEXT_CACHE", cache)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    command
}

const ENOUGH: u64 = 1;

/// The process is killed while the server holds the second half of shard 1 back.
#[test]
fn killed_in_a_chunk_and_started_again_is_as_never_killed() {
    if testing::is_child() {
        let (hub, cache) = child_args();
        let tokens = prepare_web(&hub, &cache, ENOUGH, 1).unwrap()[0].n_tokens;
        prepare_web(&hub, &cache, 3 * tokens, 1).unwrap();
        return;
    }
    let (reached, wait) = mpsc::channel();
    let server = Server::start(move |request, n_before| match n_before {
        0 => published(request),
        1 => published(request).cut(50),
        _ => {
            // The second time that the rest is asked for, the first half is in the child's hands.
            if n_before == 3 {
                reached.send(()).unwrap();
            }
            Answer::status(503)
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let name = "killed_in_a_chunk_and_started_again_is_as_never_killed";
    let mut process = child(name, &server, folder.path()).spawn().unwrap();
    wait.recv_timeout(Duration::from_mins(1)).unwrap();
    process.kill().unwrap();
    process.wait().unwrap();
    let left: Vec<String> = contents(folder.path()).into_iter().map(|it| it.0).collect();
    assert_eq!(left, ["chunk_0.bin", "chunk_0.json", "chunk_1.bin.tmp"]);

    let good = Server::start(|request, _| published(request));
    let tokens = prepare_web(&good.hub(), folder.path(), ENOUGH, 1).unwrap()[0].n_tokens;
    prepare_web(&good.hub(), folder.path(), 3 * tokens, 1).unwrap();
    assert_eq!(contents(folder.path()), undisturbed(3));
}

#[test]
fn two_processes_make_each_chunk_once() {
    if testing::is_child() {
        let (hub, cache) = child_args();
        let tokens = prepare_web(&hub, &cache, ENOUGH, 1).unwrap()[0].n_tokens;
        prepare_web(&hub, &cache, 4 * tokens, 2).unwrap();
        return;
    }
    let server = Server::start(|request, _| published(request));
    let folder = tempfile::tempdir().unwrap();
    let start = || {
        let name = "two_processes_make_each_chunk_once";
        child(name, &server, folder.path()).spawn().unwrap()
    };
    for mut process in [start(), start(), start()] {
        assert!(process.wait().unwrap().success());
    }
    assert_eq!(server.paths().len(), 4, "{:?}", server.paths());
    assert_eq!(contents(folder.path()), undisturbed(4));
}

/// A disk that takes no more bytes, as a limit of the process that does not kill it.
#[test]
fn a_full_disk_leaves_nothing_half_done() {
    if testing::is_child() {
        let (hub, cache) = child_args();
        let error = prepare_web(&hub, &cache, ENOUGH, 1).unwrap_err();
        assert!(
            matches!(error, TextError::Io { doing: "write", .. }),
            "{error}"
        );
        assert!(error.to_string().contains("File too large"), "{error}");
        assert!(error.help().contains("df -h"), "{}", error.help());
        return;
    }
    let server = Server::start(|request, _| {
        let texts: Vec<String> = (0..2000).map(testing::sentence).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        Answer::file(request, &shard_of(&texts), "\"a\"")
    });
    let folder = tempfile::tempdir().unwrap();
    let direct = child(
        "a_full_disk_leaves_nothing_half_done",
        &server,
        folder.path(),
    );
    let mut limited = std::process::Command::new("sh");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\""])
        .arg(direct.get_program())
        .args(direct.get_args())
        .envs(
            direct
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
    let output = limited.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
    let left: Vec<String> = contents(folder.path()).into_iter().map(|it| it.0).collect();
    assert_eq!(left, ["chunk_0.json"]);
}
