//! How many bytes of each shard have been read, counted by the threads that read and shown by the one that may speak to
//! the host; the other way, that thread's wish to stop.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{error::TextError, progress::Progress};

/// The shards that are being read.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Bytes done and in all (0 if unknown) of each shard.
    shards: Mutex<BTreeMap<usize, (u64, u64)>>,
    is_stopped: AtomicBool,
}

impl Meter {
    /// Makes readers fail soon.
    pub(crate) fn stop(&self, is_stopped: bool) {
        self.is_stopped.store(is_stopped, Ordering::Relaxed);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }

    /// News of every shard that is being read.
    pub(crate) fn news(&self) -> Vec<Progress> {
        let shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        let news = shards
            .iter()
            .map(|(&shard, &(done, total))| Progress::Reading { shard, done, total });
        news.collect()
    }

    /// Puts numbers of another kind in the place of the sums, until there are sums again.
    pub(crate) fn show(&self, shard: usize, done: u64, total: u64) {
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        shards.insert(shard, (done, total));
    }

    fn add(&self, shard: usize, done: u64, total: u64) {
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        let sums = shards.entry(shard).or_default();
        sums.0 += done;
        sums.1 += total;
    }

    fn remove(&self, shard: usize) {
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        shards.remove(&shard);
    }
}

/// The line of one shard on the meter, there as long as a reader of the shard is.
#[derive(Debug, Clone)]
pub(crate) struct Counted(Arc<Line>);

#[derive(Debug)]
struct Line {
    meter: Arc<Meter>,
    shard: usize,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.meter.remove(self.shard);
    }
}

impl Counted {
    pub(crate) fn new(meter: Arc<Meter>, shard: usize) -> Self {
        Self(Arc::new(Line { meter, shard }))
    }

    /// Adds bytes that have been read, and bytes that there are.
    ///
    /// # Errors
    /// [`TextError::Cancelled`] if reading is to stop.
    pub(crate) fn add(&self, done: u64, total: u64) -> Result<(), TextError> {
        self.0.meter.add(self.0.shard, done, total);
        if self.0.meter.is_stopped() {
            return Err(TextError::Cancelled);
        }
        Ok(())
    }

    /// Counts what is read from `bytes`, of which there are `total` (0 if unknown).
    pub(crate) fn reader<R: Read>(&self, bytes: R, total: u64) -> impl Read + use<R> {
        // A wish to stop is seen by the first read.
        let _ = self.add(0, total);
        CountedReader {
            bytes,
            counted: self.clone(),
        }
    }
}

struct CountedReader<R> {
    bytes: R,
    counted: Counted,
}

impl<R: Read> Read for CountedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.bytes.read(buffer)?;
        self.counted.add(n as u64, 0).map_err(io::Error::other)?;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_shown_while_it_is_read_and_can_be_stopped() {
        let meter = Arc::new(Meter::default());
        let counted = Counted::new(Arc::clone(&meter), 7);
        let mut reader = counted.reader(&[1u8; 10][..], 10);
        drop(counted);
        reader.read_exact(&mut [0; 4]).unwrap();
        let (shard, done, total) = (7, 4, 10);
        assert_eq!(meter.news(), [Progress::Reading { shard, done, total }]);
        meter.stop(true);
        let error = reader.read(&mut [0; 4]).unwrap_err();
        assert!(matches!(
            error.downcast::<TextError>(),
            Ok(TextError::Cancelled)
        ));
        drop(reader);
        assert_eq!(meter.news(), []);
    }
}
