//! `-dry_run 1`: one step of the run as typed, and what it took; nothing is saved.

use super::TrainError;
use super::memory::Memory;
use super::run::Run;
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
        let n_tokens = stream.n_windows * stream.seq_len as u64;
        line(
            "validation",
            format!(
                "`{}`, {n_tokens} tokens each {} steps",
                stream.name, run.config.eval_interval
            ),
        );
    }
    line("memory", Memory::of(run).to_string());
    line(
        "first step",
        format!(
            "{seconds:.2} s, {:.0} tokens/s; later steps are faster",
            run.tokens_per_step as f64 / seconds
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
        run.tokens_per_step,
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
}
