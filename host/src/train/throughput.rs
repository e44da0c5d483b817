//! How much of the hardware's arithmetic a run uses (MFU: model FLOP utilization).

use moeut_plugin_api::ModelSummary;
use tch::Device;

/// Dense 16-bit matrix products with 32-bit sums, in 10¹² operations per second, by a part of the driver's name for
/// the card; the makers' data sheets. A longer name comes before its beginning.
const PEAK_TFLOPS: &[(&str, f64)] = &[
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
];

/// The peak of a known card.
fn known_peak(name: &str) -> Option<f64> {
    let words: Vec<&str> = name.split([' ', '-']).collect();
    PEAK_TFLOPS.iter().find_map(|(card, tflops)| {
        let wanted: Vec<&str> = card.split(' ').collect();
        let is_it = words.windows(wanted.len()).any(|part| part == wanted);
        is_it.then_some(*tflops)
    })
}

/// Floating-point operations of a training step per token.
///
/// ```text
/// 2 · 3 · MACs / seq_len    a multiply-accumulate is two, and the backward pass costs two forward passes
/// 6 · n_params              for a model that does not count its multiply-accumulates
/// ```
/// The second counts every expert as used, and a shared layer once. Both leave out what is computed again to save memory.
pub fn flops_per_token(summary: &ModelSummary, seq_len: u64, n_params: usize) -> f64 {
    let macs: u64 = summary.macs.iter().map(|(_, macs)| macs).sum();
    match macs {
        0 => 6.0 * n_params as f64,
        macs => 6.0 * macs as f64 / seq_len as f64,
    }
}

/// What [`mfu`](Throughput::mfu) is measured with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Throughput {
    /// Floating-point operations of a training step per token.
    pub flops_per_token: f64,
    /// Operations per second that the device can do at most, if that is known.
    pub peak_flops: Option<f64>,
}

impl Throughput {
    /// `peak_tflops` is the user's word; without it the table decides, which is about 16-bit products on a GPU.
    pub fn new(
        flops_per_token: f64,
        peak_tflops: Option<f64>,
        device: Device,
        is_16_bit: bool,
    ) -> Self {
        let known = || {
            let describes = is_16_bit && device.is_cuda();
            let card = describes.then(|| moeut_torch::cuda::describe(device).ok())??;
            known_peak(&card.name)
        };
        Self {
            flops_per_token,
            peak_flops: peak_tflops.or_else(known).map(|tflops| tflops * 1e12),
        }
    }

    /// The share of the peak that training reaches, 0 to 1.
    pub fn mfu(&self, tokens_per_s: f64) -> Option<f64> {
        Some(self.flops_per_token * tokens_per_s / self.peak_flops?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_known_by_their_whole_words() {
        for (name, peak) in [
            ("NVIDIA H100 80GB HBM3", Some(989.0)),
            ("NVIDIA H100 PCIe", Some(756.0)),
            ("NVIDIA A100-SXM4-80GB", Some(312.0)),
            ("Tesla V100-SXM2-16GB", Some(125.0)),
            ("NVIDIA L40", None),
            ("NVIDIA A1000", None),
        ] {
            assert_eq!(known_peak(name), peak, "{name}");
        }
    }

    #[test]
    fn a_model_that_counts_is_believed() {
        let mut summary = ModelSummary::default();
        assert!((flops_per_token(&summary, 8, 100) - 600.0).abs() < 1e-9);
        summary.macs = vec![("attention".into(), 30), ("feed-forward".into(), 50)];
        assert!((flops_per_token(&summary, 8, 100) - 60.0).abs() < 1e-9);
    }

    #[test]
    fn the_share_of_the_peak() {
        let measured = Throughput::new(6e6, Some(0.012), Device::Cpu, false);
        let mfu = measured.mfu(1000.0).unwrap();
        assert!((mfu - 0.5).abs() < 1e-12, "{mfu}");
        assert_eq!(Throughput::new(6.0, None, Device::Cpu, true).mfu(1.0), None);
    }
}
