//! The token cache of documents that can be told apart: ids without separators, and a file with the length of each
//! document beside every chunk. Cutting windows out of them is in [`crate::document_stream`].

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
};

use crate::{
    error::TextError,
    files::{AtomicFile, write_atomically},
    progress::Progress,
    token_cache::{BATCH_DOCUMENTS, ChunkInfo, Work},
    tokenizer::Encoder,
};

/// A document of one token has nothing to predict.
const LEAST_TOKENS: usize = 2;

impl Work<'_> {
    /// Makes one chunk of documents, its lengths and its sidecar.
    pub(crate) fn tokenize_documents(
        self,
        shard: usize,
        encoder: &mut Encoder<'_>,
        news: &mpsc::Sender<Progress>,
        stop: &AtomicBool,
    ) -> Result<(), TextError> {
        let path = self.cache.chunk_path(self.split, shard);
        let mut file = AtomicFile::create(&path)?;
        let mut info = ChunkInfo::default();
        let (mut bytes, mut ids, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for document in self.shards.documents(shard)? {
            let text = document?;
            ids.clear();
            encoder.encode_into(&text, &mut ids)?;
            let Some(length) = u32::try_from(ids.len())
                .ok()
                .filter(|_| ids.len() >= LEAST_TOKENS)
            else {
                continue;
            };
            lengths.extend_from_slice(&length.to_le_bytes());
            info.n_tokens += u64::from(length);
            info.n_documents += 1;
            info.utf8_bytes += text.len() as u64;
            bytes.clear();
            for &id in &ids {
                self.cache.width().push(id, &mut bytes);
            }
            file.write(&bytes)?;
            if info.n_documents.is_multiple_of(BATCH_DOCUMENTS) && stop.load(Ordering::Relaxed) {
                return Err(TextError::Cancelled);
            }
        }
        // The chunk last, because it is the file that is looked for.
        write_atomically(&lengths_path(&path), &lengths)?;
        write_atomically(&path.with_extension("json"), &self.sidecar(shard, info)?)?;
        file.finish()?;
        // A receiver that is gone has stopped the work already.
        drop(news.send(Progress::ChunkDone {
            shard,
            n_tokens: info.n_tokens,
        }));
        Ok(())
    }
}

fn lengths_path(chunk: &Path) -> PathBuf {
    chunk.with_extension("lengths")
}

/// The tokens of each document of a chunk.
///
/// # Errors
/// There is no such file, or it is damaged.
pub(crate) fn read_lengths(chunk: &Path) -> Result<Vec<u32>, TextError> {
    let path = lengths_path(chunk);
    let unreadable = |source| TextError::io("read", &path, source);
    let bytes = fs::read(&path).map_err(unreadable)?;
    let (lengths, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        let why = "its size is not a multiple of 4";
        return Err(unreadable(io::Error::new(ErrorKind::InvalidData, why)));
    }
    Ok(lengths.iter().map(|&it| u32::from_le_bytes(it)).collect())
}
