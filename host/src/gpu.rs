//! Which GPU `-gpu auto` means: a card that nobody computes on, else the one with the least memory in use.
//!
//! Processes that start together must not choose the same card. So the choice is made under a lock of the whole
//! machine, and the lock is held until the card shows a process. NVIDIA's management library (NVML) is opened at run
//! time; where there is none, the first card is taken.
//!
//! Source: reference `framework/helpers/training_helper.py`, which asks `nvidia-smi`.

use crate::args::GpuChoice;
use crate::log::{Level, Terminal};
use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use std::fs::File;
use std::path::PathBuf;
use tch::{Device, Kind, Tensor};

/// A card as NVML sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Card {
    index: u32,
    n_processes: u32,
    bytes_used: u64,
}

/// Replaces `auto` by the index of a card and makes that card busy; leaves everything else alone. `n_gpus` is how many
/// cards libtorch sees.
pub fn take(wish: GpuChoice, n_gpus: u32, terminal: &Terminal) -> GpuChoice {
    if wish != GpuChoice::Auto || n_gpus == 0 {
        return wish;
    }
    // Someone else has chosen already: a scheduler, or the user.
    if let Some(visible) = std::env::var("CUDA_VISIBLE_DEVICES")
        .ok()
        .filter(|list| !list.is_empty())
    {
        let text =
            format!("`CUDA_VISIBLE_DEVICES={visible}` is set: the first GPU of these is taken");
        terminal.message(Level::Info, &text);
        return GpuChoice::Index(0);
    }
    let _turn = lock_machine();
    let index = match cards() {
        Ok(cards) if cards.len() == n_gpus as usize => choose(&cards).unwrap_or(0),
        Ok(cards) => {
            let text = format!(
                "the first GPU is taken: libtorch sees {n_gpus} and the driver {}, so nobody knows which is which",
                cards.len()
            );
            terminal.message(Level::Warning, &text);
            0
        }
        Err(error) => {
            let text =
                format!("the first GPU is taken: the driver does not say which are free: {error}");
            terminal.message(Level::Warning, &text);
            0
        }
    };
    // If the card refuses, the first tensor of the run says so.
    let device = Device::Cuda(usize::try_from(index).unwrap_or(0));
    let _ = Tensor::f_zeros([1], (Kind::Float, device));
    GpuChoice::Index(index)
}

/// The indices of cards without processes; all of them if someone else has chosen already, or the driver does not say.
pub fn free(n_gpus: u32) -> Vec<u32> {
    let is_chosen = std::env::var("CUDA_VISIBLE_DEVICES").is_ok_and(|list| !list.is_empty());
    match cards() {
        Ok(cards) if !is_chosen && cards.len() == n_gpus as usize => cards
            .iter()
            .filter(|card| card.n_processes == 0)
            .map(|card| card.index)
            .collect(),
        Ok(_) | Err(_) => (0..n_gpus).collect(),
    }
}

/// The first card without processes, else the one with the least memory in use.
fn choose(cards: &[Card]) -> Option<u32> {
    let free = cards.iter().find(|card| card.n_processes == 0);
    let emptiest = || {
        cards
            .iter()
            .min_by_key(|card| (card.bytes_used, card.index))
    };
    free.or_else(emptiest).map(|card| card.index)
}

/// All cards, in the order of their places on the bus, which is libtorch's order, too.
fn cards() -> Result<Vec<Card>, NvmlError> {
    let nvml = Nvml::init()?;
    (0..nvml.device_count()?)
        .map(|index| {
            let card = nvml.device_by_index(index)?;
            Ok(Card {
                index,
                n_processes: card.running_compute_processes_count()?,
                bytes_used: card.memory_info()?.used,
            })
        })
        .collect()
}

/// Waits for the turn of this process; without a lock if the folder of temporary files allows none, because two
/// processes on one card are a smaller evil than none.
fn lock_machine() -> Option<File> {
    let path: PathBuf = std::env::temp_dir().join("moeut_gpu_allocation_lock");
    // Another user's file may be opened for reading only, which is enough for a lock.
    let file = File::open(&path).or_else(|_| File::create(&path)).ok()?;
    file.lock().ok()?;
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(index: u32, n_processes: u32, gib_used: u64) -> Card {
        Card {
            index,
            n_processes,
            bytes_used: gib_used << 30,
        }
    }

    #[test]
    fn a_free_card_comes_first_and_else_the_emptiest() {
        assert_eq!(choose(&[]), None);
        assert_eq!(
            choose(&[card(0, 1, 1), card(1, 0, 9), card(2, 0, 0)]),
            Some(1)
        );
        assert_eq!(
            choose(&[card(0, 1, 7), card(1, 2, 3), card(2, 1, 3)]),
            Some(1)
        );
    }

    #[test]
    fn only_auto_is_replaced() {
        let terminal = Terminal::new(crate::log::Verbosity::Quiet);
        assert_eq!(take(GpuChoice::Cpu, 2, &terminal), GpuChoice::Cpu);
        assert_eq!(take(GpuChoice::Index(1), 2, &terminal), GpuChoice::Index(1));
        assert_eq!(take(GpuChoice::Auto, 0, &terminal), GpuChoice::Auto);
    }
}
