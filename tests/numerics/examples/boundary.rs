//! What the plugin boundary costs: `cargo run --release -p moeut-numerics --example boundary`.
//!
//! Medians of 21 rounds. Opening is timed once per plugin, because a library is loaded once per process.
#![expect(
    clippy::print_stdout,
    reason = "a command line program: this is its user interface"
)]

use moeut_host::plugins::{Gate, inspect, library};
use moeut_numerics::{plugins, tiny};
use moeut_torch::{IntoHandle, IntoTensor};
use std::hint::black_box;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

const N_ROUNDS: usize = 21;
const N_CALLS: u32 = 100_000;

fn main() -> moeut_numerics::Result<()> {
    let folder = std::env::current_exe()?
        .ancestors()
        .nth(2)
        .map(|folder| folder.join("plugins"));
    // Libraries stay: the loader knows each by the number of its handle.
    let (mut opening, mut libraries) = (Vec::new(), Vec::new());
    for entry in folder
        .iter()
        .flat_map(std::fs::read_dir)
        .flatten()
        .flatten()
    {
        let path = entry.path();
        let start = Instant::now();
        let manifest = inspect::inspect(&path)?;
        Gate::default().check(&manifest.plugin.name, &manifest.sha256)?;
        let inspected = start.elapsed();
        let opened = library::open(manifest)?;
        opening.push((
            start.elapsed(),
            inspected,
            opened.manifest.plugin.name.clone(),
        ));
        libraries.push(opened);
    }
    opening.sort();
    if let (Some((median, of_it, _)), Some((worst, _, name))) =
        (opening.get(opening.len() / 2), opening.last())
    {
        println!(
            "open a plugin ({} of them)   {median:.2?}, of which {of_it:.2?} to inspect it",
            opening.len()
        );
        println!("  the slowest, {name}   {worst:.2?}");
    } else {
        println!("no plugins are staged: `cargo xtask build` first");
    }

    let kernels = plugins::kernels()?;
    let kernel = kernels.first().ok_or("no kernel builds")?;
    let subject = tiny::build(
        &[&[("transformer.variant", "preln_rope_universal")]],
        kernel,
    )?;
    println!(
        "an empty call       {:.1} ns",
        nanoseconds(|| {
            black_box(subject.model.graph_safe().is_ok());
        })
    );
    let tensor = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu));
    println!(
        "a tensor, both ways {:.1} ns",
        nanoseconds(|| {
            drop(black_box(tensor.share().into_tensor()));
        })
    );
    Ok(())
}

/// The median time of a call.
fn nanoseconds(mut call: impl FnMut()) -> f64 {
    let mut rounds: Vec<f64> = (0..N_ROUNDS)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..N_CALLS {
                call();
            }
            start.elapsed().as_secs_f64() * 1e9 / f64::from(N_CALLS)
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[N_ROUNDS / 2]
}
