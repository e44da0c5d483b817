//! Windows of tokens over the chunks of a cache, read through memory maps.
//! It neither makes chunks nor orders windows: the one is [`crate::token_cache`]'s, the other the host's.

#![expect(unsafe_code, reason = "maps the chunk files")]

use std::{fs::File, path::PathBuf};

use memmap2::Mmap;

use crate::{
    error::TextError,
    numpy::Rng,
    token_cache::{Amount, Chunk, TokenWidth},
};

/// How a stream is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamOptions {
    /// Tokens predicted per window; a window has one more.
    pub seq_len: usize,
    /// How much of the chunks is used.
    pub amount: Amount,
    /// Pieces of the tokenizer; every id read is checked against it.
    pub vocab_size: usize,
    /// Places chunk `i` at `offset[i-1] + size[i]`, as the reference does, instead of `offset[i-1] + size[i-1]`.
    /// Parts of chunks are then read twice or never; for comparing with the reference. Pinned by the test
    /// `offsets_are_right_by_default_and_the_references_on_request`.
    pub compat: bool,
}

/// All tokens of a split as one circular sequence, in windows of `seq_len + 1` that overlap by one token.
///
/// ```text
/// window(i) = token(i·seq_len) … token(i·seq_len + seq_len)      after the last chunk comes the first
/// n_windows = ⌊min(n_tokens, limit) / seq_len⌋
/// ```
///
/// # Source
/// Reference code `dataset/text/chunked_setencepiece_lm_dataset.py`.
#[derive(Debug)]
pub struct TokenStream {
    chunks: Vec<MappedChunk>,
    /// Place of each chunk's first token.
    offsets: Vec<u64>,
    n_tokens: u64,
    n_windows: u64,
    /// Window `order[i]` is handed out as window `i`; none for their own order.
    order: Option<Vec<u32>>,
    options: StreamOptions,
    utf8_bytes_per_token: Option<f64>,
}

impl TokenStream {
    /// Maps the chunks that `options.amount` asks for.
    ///
    /// # Errors
    /// A chunk cannot be opened, or there is not one window.
    ///
    /// # Panics
    /// If `seq_len` is 0, which is a bug in the caller.
    pub fn open(chunks: &[Chunk], options: StreamOptions) -> Result<Self, TextError> {
        assert!(options.seq_len > 0, "seq_len is 0");
        let sizes: Vec<u64> = chunks.iter().map(|chunk| chunk.n_tokens).collect();
        let layout = Layout::new(&sizes, options.amount, options.compat);
        let chunks = &chunks[..layout.offsets.len()];
        let width = TokenWidth::for_vocab_size(options.vocab_size);
        let n_used = options
            .amount
            .limit
            .map_or(layout.n_tokens, |limit| limit.min(layout.n_tokens));
        let n_windows = n_used / options.seq_len as u64;
        // One window at least also means that some kept chunk is not empty, so that reading comes to an end.
        if n_windows == 0 {
            return Err(TextError::TooShort {
                n_tokens: n_used,
                seq_len: options.seq_len,
            });
        }
        let n_read: u64 = chunks.iter().map(|chunk| chunk.n_tokens).sum();
        let utf8_bytes: Option<u64> = chunks.iter().map(|chunk| chunk.utf8_bytes).sum();
        Ok(Self {
            chunks: chunks
                .iter()
                .map(|chunk| MappedChunk::open(chunk, width))
                .collect::<Result<_, _>>()?,
            offsets: layout.offsets,
            n_tokens: layout.n_tokens,
            n_windows,
            order: None,
            options,
            utf8_bytes_per_token: utf8_bytes.map(|bytes| bytes as f64 / n_read as f64),
        })
    }

    /// The same windows in the random order of The Stack, `default_rng(123).permutation(n_tokens // seq_len)` of NumPy.
    /// The limit counts windows after that, so that they come from all chunks.
    ///
    /// # Errors
    /// There are more than 2³²−1 windows.
    ///
    /// # Source
    /// Reference code `dataset/text/thestack.py`.
    pub fn shuffled(mut self) -> Result<Self, TextError> {
        let n = self.n_tokens / self.options.seq_len as u64;
        let n = u32::try_from(n).map_err(|_| TextError::TooManyWindows { n_windows: n })?;
        self.order = Some(Rng::new(123).permutation(n));
        Ok(self)
    }

    /// Number of windows; at least one.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.n_windows
    }

    /// Tokens in the chunks, before the limit.
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// UTF-8 bytes of document text per token, separators among the tokens but not the bytes.
    ///
    /// Divide a loss in nats per token by this and by ln 2 for bits per byte. None if a chunk has no sidecar.
    pub fn utf8_bytes_per_token(&self) -> Option<f64> {
        self.utf8_bytes_per_token
    }

    /// Reads window `index` into `tokens`.
    ///
    /// # Shapes
    /// - `tokens`: `seq_len + 1`
    ///
    /// # Errors
    /// A file of the cache holds an id that the tokenizer does not have.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`] or `tokens` has another length, which are bugs in the caller.
    pub fn read_window(&self, index: u64, tokens: &mut [i32]) -> Result<(), TextError> {
        assert!(
            index < self.n_windows,
            "window {index} of {}",
            self.n_windows
        );
        assert_eq!(
            tokens.len(),
            self.options.seq_len + 1,
            "length of the window"
        );
        let index = match &self.order {
            Some(order) => u64::from(order[usize::try_from(index).unwrap_or(usize::MAX)]),
            None => index,
        };
        let start = index * self.options.seq_len as u64;
        // The last chunk that begins at or before `start`. The first begins at 0, so there is one.
        let mut chunk = self.offsets.partition_point(|&offset| offset <= start) - 1;
        let mut within = start - self.offsets[chunk];
        let mut filled = 0;
        while filled < tokens.len() {
            filled +=
                self.chunks[chunk].read(within, &mut tokens[filled..], self.options.vocab_size)?;
            chunk = (chunk + 1) % self.chunks.len();
            within = 0;
        }
        Ok(())
    }
}

/// Where chunks lie in the sequence.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    offsets: Vec<u64>,
    n_tokens: u64,
}

impl Layout {
    /// Keeps the first `i` chunks for the first `i ≥ 1` whose offset reaches the limit, at least the minimum.
    fn new(sizes: &[u64], amount: Amount, compat: bool) -> Self {
        let mut offsets: Vec<u64> = Vec::with_capacity(sizes.len());
        for (i, &size) in sizes.iter().enumerate() {
            let offset = match offsets.last() {
                None => 0,
                Some(last) => last.saturating_add(if compat { size } else { sizes[i - 1] }),
            };
            let is_enough = amount.limit.is_some_and(|limit| i >= 1 && offset >= limit);
            if is_enough && i >= amount.min_chunks {
                break;
            }
            offsets.push(offset);
        }
        let n_tokens = match offsets.len() {
            0 => 0,
            n => offsets[n - 1].saturating_add(sizes[n - 1]),
        };
        Self { offsets, n_tokens }
    }
}

#[derive(Debug)]
pub(crate) struct MappedChunk {
    path: PathBuf,
    width: TokenWidth,
    n_tokens: u64,
    /// None for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl MappedChunk {
    pub(crate) fn open(chunk: &Chunk, width: TokenWidth) -> Result<Self, TextError> {
        let unreadable = |source| TextError::io("read", &chunk.path, source);
        let file = File::open(&chunk.path).map_err(unreadable)?;
        let n_bytes = file.metadata().map_err(unreadable)?.len();
        if n_bytes != chunk.n_tokens * width.bytes() as u64 {
            let message = format!("it has {n_bytes} bytes, expected {} tokens", chunk.n_tokens);
            return Err(unreadable(std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                message,
            )));
        }
        let map = if n_bytes == 0 {
            None
        } else {
            // SAFETY: a chunk is never changed in place: the cache replaces whole files by renaming, which leaves a
            // mapped one as it was. Somebody who truncates it by hand makes reads fault; that is the price of a map.
            Some(unsafe { Mmap::map(&file) }.map_err(unreadable)?)
        };
        Ok(Self {
            path: chunk.path.clone(),
            width,
            n_tokens: chunk.n_tokens,
            map,
        })
    }

    /// Copies tokens from `start` on, until the end of the chunk or of `out`; returns how many. Under the
    /// reference's offsets `start` may lie behind the end.
    pub(crate) fn read(
        &self,
        start: u64,
        out: &mut [i32],
        vocab_size: usize,
    ) -> Result<usize, TextError> {
        let Some(map) = self.map.as_ref().filter(|_| start < self.n_tokens) else {
            return Ok(0);
        };
        let Ok(first_byte) = usize::try_from(start * self.width.bytes() as u64) else {
            return Ok(0);
        };
        let bytes = &map[first_byte..];
        let n_read = out.len().min(bytes.len() / self.width.bytes());
        let (bytes, out) = (&bytes[..n_read * self.width.bytes()], &mut out[..n_read]);
        let all_known = match self.width {
            TokenWidth::U8 => widen(bytes, out, vocab_size, |[byte]: [u8; 1]| i32::from(byte)),
            TokenWidth::I16 => widen(bytes, out, vocab_size, |id| i16::from_le_bytes(id).into()),
            TokenWidth::I32 => widen(bytes, out, vocab_size, i32::from_le_bytes),
            // An id that does not fit becomes one that is in no vocabulary.
            TokenWidth::I64 => widen(bytes, out, vocab_size, |id| {
                i64::from_le_bytes(id).try_into().unwrap_or(-1)
            }),
        };
        if all_known {
            return Ok(n_read);
        }
        let is_known = |&id: &i64| usize::try_from(id).is_ok_and(|index| index < vocab_size);
        let mut unknown = (start..)
            .zip(self.width.ids(bytes))
            .filter(|(_, id)| !is_known(id));
        let (position, id) = unknown.next().unwrap_or_default();
        Err(TextError::BadToken {
            path: self.path.clone(),
            position,
            id,
            vocab_size,
        })
    }
}

/// Decodes whole elements into `out`; whether all ids are in `0..vocab_size`.
///
/// The question is put once, to the sign of all of them together, so that the loop has no branch and becomes one of
/// vector instructions: an id is wrong if it is negative or the last id minus it is.
fn widen<const N: usize>(
    bytes: &[u8],
    out: &mut [i32],
    vocab_size: usize,
    decode: impl Fn([u8; N]) -> i32,
) -> bool {
    let last = i32::try_from(vocab_size).map_or(i32::MAX, |n| n - 1);
    let mut signs = 0;
    for (slot, element) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        let id = decode(*element);
        *slot = id;
        signs |= id | last.wrapping_sub(id);
    }
    signs >= 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Chunk files of `int16` ids that count up through all chunks.
    fn counting_chunks(folder: &std::path::Path, sizes: &[u64]) -> Vec<Chunk> {
        let mut next = 0i16;
        let mut chunks = Vec::new();
        for (i, &n_tokens) in sizes.iter().enumerate() {
            let path = folder.join(format!("chunk_{i}.bin"));
            let mut bytes = Vec::new();
            for _ in 0..n_tokens {
                bytes.extend_from_slice(&next.to_le_bytes());
                next += 1;
            }
            std::fs::write(&path, bytes).unwrap();
            chunks.push(Chunk {
                path,
                n_tokens,
                utf8_bytes: Some(n_tokens * 3),
            });
        }
        chunks
    }

    fn options(seq_len: usize, compat: bool) -> StreamOptions {
        StreamOptions {
            seq_len,
            amount: Amount::default(),
            vocab_size: 8000,
            compat,
        }
    }

    fn window(stream: &TokenStream, index: u64) -> Vec<i32> {
        let mut tokens = vec![-1; stream.options.seq_len + 1];
        stream.read_window(index, &mut tokens).unwrap();
        tokens
    }

    #[test]
    fn offsets_are_right_by_default_and_the_references_on_request() {
        let layout = |sizes: &[u64], compat| {
            let layout = Layout::new(sizes, Amount::default(), compat);
            (layout.offsets, layout.n_tokens)
        };
        assert_eq!(layout(&[100, 80, 90], false), (vec![0, 100, 180], 270));
        assert_eq!(layout(&[100, 80, 90], true), (vec![0, 80, 170], 260));
        assert_eq!(layout(&[80, 100, 90], false), (vec![0, 80, 180], 270));
        assert_eq!(layout(&[80, 100, 90], true), (vec![0, 100, 190], 280));
        assert_eq!(layout(&[], false), (vec![], 0));
    }

    #[test]
    fn a_limit_keeps_the_first_chunks() {
        let kept = |limit, min_chunks, compat| {
            Layout::new(
                &[100, 80, 90],
                Amount {
                    limit: Some(limit),
                    min_chunks,
                },
                compat,
            )
            .offsets
            .len()
        };
        assert_eq!(kept(80, 1, true), 1);
        assert_eq!(kept(81, 1, true), 2);
        assert_eq!(kept(100, 1, false), 1);
        assert_eq!(kept(101, 1, false), 2);
        assert_eq!(kept(1, 0, false), 1);
        assert_eq!(kept(1, 2, false), 2);
        assert_eq!(kept(1000, 1, false), 3);
    }

    #[test]
    fn the_references_gap_returns_the_next_chunks_beginning() {
        let folder = tempfile::tempdir().unwrap();
        let stream = TokenStream::open(
            &counting_chunks(folder.path(), &[80, 100, 90]),
            options(10, true),
        )
        .unwrap();
        assert_eq!(stream.len(), 28);
        // Tokens 80..100 of the sequence do not exist; both windows there read what chunk 1 begins with.
        let beginning: Vec<i32> = (80..91).collect();
        assert_eq!(window(&stream, 8), beginning);
        assert_eq!(window(&stream, 9), beginning);
        assert_eq!(window(&stream, 10), beginning);
    }

    /// The order is NumPy's, which `numpy.rs` has as a golden; the limit does not narrow what it chooses from.
    #[test]
    fn shuffled_windows_are_those_of_the_whole_stream() {
        let folder = tempfile::tempdir().unwrap();
        let amount = Amount {
            limit: Some(50),
            min_chunks: 2,
        };
        let chunks = counting_chunks(folder.path(), &[60, 45]);
        let options = StreamOptions {
            amount,
            ..options(10, false)
        };
        let stream = TokenStream::open(&chunks, options).unwrap().shuffled();
        let stream = stream.unwrap();
        assert_eq!(stream.len(), 5);
        let first: Vec<i32> = (0..5).map(|i| window(&stream, i)[0]).collect();
        assert_eq!(first, [70, 40, 0, 20, 10]);
    }

    #[test]
    fn a_foreign_id_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut chunks = counting_chunks(folder.path(), &[20]);
        std::fs::write(&chunks[0].path, [0, 0, 0xff, 0xff]).unwrap();
        chunks[0].n_tokens = 2;
        let stream = TokenStream::open(&chunks, options(1, false)).unwrap();
        let error = stream.read_window(0, &mut [0, 0]).unwrap_err().to_string();
        assert!(
            error.ends_with("holds token id -1 at position 1, which is not in 0..8000"),
            "{error}"
        );
    }

    #[test]
    fn every_width_is_read_and_its_foreign_ids_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chunk_0.bin");
        let read = |width: usize, vocab_size: usize, ids: &[i64]| {
            let bytes: Vec<u8> = ids
                .iter()
                .flat_map(|id| id.to_le_bytes()[..width].to_owned())
                .collect();
            std::fs::write(&path, bytes).unwrap();
            let chunk = Chunk {
                path: path.clone(),
                n_tokens: ids.len() as u64,
                utf8_bytes: None,
            };
            let seq_len = ids.len() - 1;
            let stream = TokenStream::open(
                &[chunk],
                StreamOptions {
                    vocab_size,
                    ..options(seq_len, false)
                },
            )
            .unwrap();
            let mut window = vec![0; ids.len()];
            stream.read_window(0, &mut window).map(|()| window)
        };
        for (width, vocab_size) in [
            (1, 255),
            (2, 32_766),
            (4, 2_147_483_646),
            (8, 2_147_483_648),
        ] {
            let last = i64::try_from(vocab_size).unwrap() - 1;
            let mut ids: Vec<i64> = (0..40).map(|i| i * 3).collect();
            ids[7] = last;
            let window = read(width, vocab_size, &ids).unwrap();
            assert!(
                ids.iter().eq(window
                    .iter()
                    .map(|&id| i64::from(id))
                    .collect::<Vec<_>>()
                    .iter())
            );
            // -1 has no place in a `uint8`.
            let wrong = if width == 1 {
                vec![255]
            } else {
                vec![last + 1, -1]
            };
            for wrong in wrong {
                ids[23] = wrong;
                match read(width, vocab_size, &ids) {
                    Err(TextError::BadToken {
                        position: 23, id, ..
                    }) => assert_eq!(id, wrong),
                    other => panic!("{width}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn a_file_that_changed_since_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let chunks = counting_chunks(folder.path(), &[20]);
        std::fs::write(&chunks[0].path, [0; 7]).unwrap();
        assert!(TokenStream::open(&chunks, options(1, false)).is_err());
    }

    proptest! {
        /// Windows are slices of the circular concatenation, whatever the chunks' sizes.
        #[test]
        fn windows_are_slices_of_the_concatenation(
            sizes in prop::collection::vec(0u64..40, 1..6),
            seq_len in 1usize..50,
            limit in prop::option::of(1u64..150),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let chunks = counting_chunks(folder.path(), &sizes);
            let amount = Amount { limit, min_chunks: 1 };
            let n_total: u64 = sizes.iter().sum();
            let n_windows = limit.unwrap_or(u64::MAX).min(n_total) / seq_len as u64;
            match TokenStream::open(&chunks, StreamOptions { amount, ..options(seq_len, false) }) {
                Err(error) => prop_assert_eq!(n_windows, 0, "{}", error),
                Ok(stream) => {
                    prop_assert_eq!(stream.len(), n_windows);
                    prop_assert_eq!(stream.utf8_bytes_per_token(), Some(3.0));
                    for index in 0..n_windows {
                        let expected: Vec<i32> = (0..=seq_len as u64)
                            .map(|k| i32::try_from((index * seq_len as u64 + k) % stream.n_tokens()).unwrap())
                            .collect();
                        prop_assert_eq!(window(&stream, index), expected);
                    }
                }
            }
        }

        /// Under the reference's offsets, too, every window of every layout can be read.
        #[test]
        fn compat_windows_never_fail(sizes in prop::collection::vec(0u64..40, 1..6), seq_len in 1usize..50) {
            let folder = tempfile::tempdir().unwrap();
            if let Ok(stream) = TokenStream::open(&counting_chunks(folder.path(), &sizes), options(seq_len, true)) {
                for index in 0..stream.len() {
                    window(&stream, index);
                }
            }
        }
    }
}
