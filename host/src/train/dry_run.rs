//! `-dry_run 1`: one step of the run as typed, and what it took; nothing is saved.

use super::TrainError;
use super::memory::Memory;
use super::run::Run;
use super::throughput::Throughput;
use super::train_step;
use std::fmt::Write;
use std::time::Instant;

/// Makes one step and returns the plan of the run, its memory and its speed, for people.
///
/// # Errors
/// As a step of the training.
pub fn dry_run(run: &mut Run) -> Result<String, TrainError> {
    let first = run.state.step;
    let start = Instant::now();
    let lr = run.schedule.lr_at(first);
    let stats = train_step(run, lr)?;
    run.advance();
    run.monitor.observe(&mut run.state, lr, stats)?;
    run.monitor.settle(&mut run.state)?; // Waits for the device.
    let seconds = start.elapsed().as_secs_f64();

    let mut text = String::from("dry run: one step, nothing is saved\n");
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<13}{value}");
    };
    let n_params: usize = run
        .parameters
        .iter()
        .map(|(_, tensor)| tensor.numel())
        .sum();
    line(
        "model",
        format!("`{}`, {n_params} parameters", run.model_name),
    );
    line("steps", steps(first, run.n_steps));
    line("batch", batch(run));
    for stream in &run.validation {
        let n_tokens = stream.stream.n_windows() * stream.stream.seq_len() as u64;
        line(
            "validation",
            format!(
                "`{}`, {n_tokens} tokens each {} steps",
                stream.name, run.config.eval_interval
            ),
        );
    }
    let n_tokens = run.batches.n_targets() as f64;
    line(
        "arithmetic",
        arithmetic(run.monitor.throughput(), n_tokens, seconds),
    );
    line("memory", Memory::of(run).to_string());
    line(
        "first step",
        format!(
            "{seconds:.2} s, {:.0} tokens/s; later steps are faster",
            n_tokens / seconds
        ),
    );
    Ok(text)
}

fn steps(first: u64, n_steps: u64) -> String {
    match n_steps {
        u64::MAX => format!("from {first}, without an end: `-stop_after` is not given"),
        n_steps => format!("from {first} to {n_steps}"),
    }
}

/// Operations of the step, and the share of the device's peak if that is known.
fn arithmetic(throughput: Throughput, n_tokens: f64, seconds: f64) -> String {
    let operations = format!(
        "{:.3} TFLOP a step",
        throughput.flops_per_token * n_tokens / 1e12
    );
    match throughput.mfu(n_tokens / seconds) {
        Some(mfu) => format!("{operations}; {:.1} % of the peak in this one", mfu * 100.0),
        None => operations,
    }
}

fn batch(run: &Run) -> String {
    let shape = run.batches.shape();
    let sizes: Vec<String> = shape
        .microbatch_sizes()
        .iter()
        .map(usize::to_string)
        .collect();
    format!(
        "{} sequences of {} tokens, {} tokens a step; microbatches of {}",
        shape.batch_size,
        shape.seq_len,
        run.batches.n_targets(),
        sizes.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_training_without_an_end_says_so() {
        assert_eq!(steps(7, 9), "from 7 to 9");
        assert_eq!(
            steps(0, u64::MAX),
            "from 0, without an end: `-stop_after` is not given"
        );
    }

    #[test]
    fn arithmetic_of_a_step() {
        let mut throughput = Throughput {
            flops_per_token: 2e9,
            peak_flops: None,
        };
        assert_eq!(arithmetic(throughput, 1000.0, 0.5), "2.000 TFLOP a step");
        throughput.peak_flops = Some(1e13);
        assert_eq!(
            arithmetic(throughput, 1000.0, 0.5),
            "2.000 TFLOP a step; 40.0 % of the peak in this one"
        );
    }
}
