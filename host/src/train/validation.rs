//! When a run validates, and under which names the scores are logged.
//!
//! ```text
//! validation/<name>/<metric>        each `-test_interval` steps, and at the end
//! load_validation/<name>/<metric>   after `-load_pretrained_model`
//! <name>/<metric>                   `-test_only`, which prints them, too
//! ```
//! With `-val_log_details`, what the model's layers tell about a stream is among its metrics, under their own names.
//! A name is that of a stream or of an evaluation set; some sets are scored at the end only, and by `-test_only`. How a
//! stream is scored is in [`super::evaluate`], and how a set is in [`crate::eval`].

use super::TrainError;
use super::evaluate::{Scores, Watcher, evaluate};
use super::reporting::Seen;
use super::run::Run;
use super::state::TrainState;
use super::timing::Phase;
use crate::eval::metrics::SetScores;
use moeut_plot::Plot;
use moeut_plugin_api::PluginError;

/// All scores, in the task's order.
#[derive(Debug, Default)]
pub struct AllScores {
    /// By stream.
    pub streams: Vec<(String, Scores)>,
    /// Of evaluation sets.
    pub sets: Vec<SetScores>,
    /// What the model tells about the streams, with `-val_log_details`.
    pub seen: Vec<(String, Seen)>,
}

impl AllScores {
    /// Name, loss and accuracy of what counts in `mean_loss` and `mean_accuracy`: the streams and LAMBADA, as in the
    /// reference, whose sweeps go by these averages.
    fn counted(&self) -> Vec<(&str, f64, f64)> {
        let streams = self.streams.iter();
        let streams = streams.map(|(name, scores)| (name.as_str(), scores.loss, scores.accuracy));
        let sets = self.sets.iter().filter(|set| set.is_in_means);
        let sets = sets.map(|set| (set.name.as_str(), set.loss, set.accuracy));
        streams.chain(sets).collect()
    }
}

/// Validates. A signal ends it without scores; then the next start validates before it trains.
///
/// # Errors
/// If the data cannot be read, the model fails, or the last step was not finite.
pub fn validate(run: &mut Run) -> Result<(), TrainError> {
    run.monitor.settle(&mut run.state)?;
    run.state.owes_validation = true;
    let is_end = run.state.step >= run.n_steps;
    if let Some(all) = score(run, is_end)? {
        run.state.owes_validation = false;
        let metrics = with_bests(&mut run.state, "validation/", &all);
        let plots = plots("validation/", all.seen);
        run.monitor.record(run.state.step, metrics, plots);
    }
    Ok(())
}

/// Validates weights that were trained elsewhere; they do not count as this run's best.
///
/// # Errors
/// As [`validate`].
pub fn validate_pretrained(run: &mut Run) -> Result<(), TrainError> {
    if let Some(all) = score(run, false)? {
        let metrics = named("load_validation/", &all);
        let plots = plots("load_validation/", all.seen);
        run.monitor.record(run.state.step, metrics, plots);
    }
    Ok(())
}

/// Validates once and returns what `-test_only` prints; nothing if a signal came.
///
/// Scripts look for the two marker lines and read JSON between them.
///
/// # Errors
/// As [`validate`].
pub fn test_only(run: &mut Run) -> Result<Option<String>, TrainError> {
    let Some(all) = score(run, true)? else {
        return Ok(None);
    };
    let metrics = with_bests(&mut run.state, "", &all);
    let json = as_json(&metrics)?;
    let plots = plots("", all.seen);
    run.monitor.record(run.state.step, metrics, plots);
    Ok(Some(format!(
        "Validate returned:\n{json}\n{}\n",
        "-".repeat(80)
    )))
}

/// Scores every stream and set, unless a signal ends it; those sets that are for the end only if this `is_end`.
fn score(run: &mut Run, is_end: bool) -> Result<Option<AllScores>, TrainError> {
    run.monitor.enter(Phase::Validate);
    let mut all = AllScores::default();
    let monitor = &run.monitor;
    for stream in &run.validation {
        let label = format!("validating on `{}`", stream.name);
        let mut observer = monitor.observer();
        let result = evaluate(
            &mut run.model,
            run.segments,
            stream,
            run.eval_batch_size,
            run.device,
            Watcher {
                signals: &run.signals,
                group: &run.group,
                observer: &mut observer,
                progress: &|done, all| monitor.work(&label, done, all),
            },
        )?;
        let Some(scores) = result else {
            return Ok(None);
        };
        let selections = observer.take_selections();
        monitor.dump(run.state.step, Some(&stream.name), &selections);
        all.seen.push((stream.name.clone(), observer.finish()?));
        monitor.result(is_end, &sentence(run.state.step, &stream.name, &scores));
        all.streams.push((stream.name.clone(), scores));
    }
    for set in run
        .evaluations
        .iter()
        .filter(|set| is_end || !set.is_end_only)
    {
        let label = format!("scoring `{}`", set.name);
        let result = set.score(
            &mut run.model,
            &run.samples.tokenizer,
            run.device,
            (&run.signals, &run.group),
            |done, all| monitor.work(&label, done, all),
        )?;
        let Some((scores, _)) = result else {
            return Ok(None);
        };
        let text = format!(
            "step {}: {} accuracy {:.1} %, loss {:.4} nats per token",
            run.state.step,
            set.name,
            scores.accuracy * 100.0,
            scores.loss
        );
        monitor.result(is_end, &text);
        all.sets.push(scores);
    }
    run.monitor.enter(Phase::Log);
    Ok(Some(all))
}

fn sentence(step: u64, stream: &str, scores: &Scores) -> String {
    let bits = scores
        .bits_per_byte
        .map(|bits| format!(", {bits:.3} bits per UTF-8 byte"));
    format!(
        "step {step}: {stream} loss {:.4} nats per token, perplexity {:.2}, accuracy {:.1} %{}",
        scores.loss,
        scores.perplexity(),
        scores.accuracy * 100.0,
        bits.unwrap_or_default()
    )
}

/// The metrics under their names, and the averages.
pub fn named(prefix: &str, all: &AllScores) -> Vec<(String, f64)> {
    let mut metrics = Vec::new();
    for (stream, scores) in &all.streams {
        let name = |metric: &str| format!("{prefix}{stream}/{metric}");
        metrics.extend([
            (name("loss"), scores.loss),
            (name("accuracy"), scores.accuracy),
            (name("perplexity"), scores.perplexity()),
        ]);
        metrics.extend(
            scores
                .bits_per_byte
                .map(|bits| (name("bits_per_byte"), bits)),
        );
    }
    for (stream, seen) in &all.seen {
        let below = |(name, value): &(String, f64)| (format!("{prefix}{stream}/{name}"), *value);
        metrics.extend(seen.scalars.iter().map(below));
    }
    for set in &all.sets {
        let of_set = set.metrics.iter();
        metrics.extend(of_set.map(|metric| {
            let name = format!("{prefix}{}/{}", set.name, metric.name);
            (name, metric.value)
        }));
    }
    let counted = all.counted();
    if !counted.is_empty() {
        let mean = |sum: f64| sum / counted.len() as f64;
        let losses = counted.iter().map(|(_, loss, _)| loss).sum();
        let accuracies = counted.iter().map(|(_, _, accuracy)| accuracy).sum();
        metrics.extend([
            (format!("{prefix}mean_loss"), mean(losses)),
            (format!("{prefix}mean_accuracy"), mean(accuracies)),
        ]);
    }
    metrics
}

/// The charts under their names.
fn plots(prefix: &str, seen: Vec<(String, Seen)>) -> Vec<(String, Plot)> {
    let of_stream = |(stream, seen): (String, Seen)| {
        let plots = seen.plots.into_iter();
        plots.map(move |(name, plot)| (format!("{prefix}{stream}/{name}"), plot))
    };
    seen.into_iter().flat_map(of_stream).collect()
}

/// As [`named`], and how many steps ago each of what counts in the averages was at its best.
fn with_bests(state: &mut TrainState, prefix: &str, all: &AllScores) -> Vec<(String, f64)> {
    let mut metrics = named(prefix, all);
    for (stream, loss, accuracy) in all.counted() {
        let name = |metric: &str| format!("{prefix}{stream}/time_since_best_{metric}");
        metrics.extend([
            (name("loss"), state.note_loss(stream, loss) as f64),
            (
                name("accuracy"),
                state.note_accuracy(stream, accuracy) as f64,
            ),
        ]);
    }
    metrics
}

/// In the order given; JSON has no infinity and no NaN, so that both are `null`.
///
/// # Errors
/// Never for finite names and numbers; the signature leaves room.
pub fn as_json(metrics: &[(String, f64)]) -> Result<String, PluginError> {
    let object: serde_json::Map<String, serde_json::Value> = metrics
        .iter()
        .map(|(name, value)| (name.clone(), (*value).into()))
        .collect();
    serde_json::to_string(&object)
        .map_err(|error| PluginError::new("the scores cannot be printed").why(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::metrics::Metric;

    fn scores(loss: f64, accuracy: f64) -> Scores {
        Scores {
            loss,
            accuracy,
            bits_per_byte: None,
            n_tokens: 7,
        }
    }

    fn all(streams: &[(&str, Scores)]) -> AllScores {
        let streams = streams.iter();
        AllScores {
            streams: streams
                .map(|&(name, scores)| (name.to_owned(), scores))
                .collect(),
            ..AllScores::default()
        }
    }

    fn set(name: &str, loss: f64, accuracy: f64, is_in_means: bool) -> SetScores {
        let metric = |name: &str, value| Metric {
            name: name.into(),
            value,
            n: 1,
        };
        SetScores {
            name: name.into(),
            metrics: vec![metric("loss", loss), metric("accuracy/total", accuracy)],
            loss,
            accuracy,
            is_in_means,
        }
    }

    #[test]
    fn names_averages_and_bests() {
        let first = all(&[("val", scores(2.0, 0.25)), ("lambada", scores(4.0, 0.75))]);
        let mut state = TrainState {
            step: 10,
            ..TrainState::default()
        };
        with_bests(&mut state, "validation/", &first);
        state.step = 30;
        let worse = all(&[("val", scores(2.5, 0.5)), ("lambada", scores(1.0, 0.5))]);
        let metrics = with_bests(&mut state, "", &worse);
        insta::assert_snapshot!(as_json(&metrics).unwrap().replace(',', ",\n"), @r#"
        {"val/loss":2.5,
        "val/accuracy":0.5,
        "val/perplexity":12.182493960703473,
        "lambada/loss":1.0,
        "lambada/accuracy":0.5,
        "lambada/perplexity":2.718281828459045,
        "mean_loss":1.75,
        "mean_accuracy":0.5,
        "val/time_since_best_loss":20.0,
        "val/time_since_best_accuracy":0.0,
        "lambada/time_since_best_loss":0.0,
        "lambada/time_since_best_accuracy":20.0}
        "#);
    }

    /// As in the reference, whose sweeps are judged by the averages.
    #[test]
    fn last_words_count_in_the_averages_and_choices_do_not() {
        let scores = AllScores {
            sets: vec![
                set("lambada", 4.0, 0.75, true),
                set("blimp", 9.0, 1.0, false),
            ],
            ..all(&[("val", scores(2.0, 0.25))])
        };
        let metrics = with_bests(&mut TrainState::default(), "", &scores);
        insta::assert_snapshot!(as_json(&metrics).unwrap().replace(',', ",\n"), @r#"
        {"val/loss":2.0,
        "val/accuracy":0.25,
        "val/perplexity":7.38905609893065,
        "lambada/loss":4.0,
        "lambada/accuracy/total":0.75,
        "blimp/loss":9.0,
        "blimp/accuracy/total":1.0,
        "mean_loss":3.0,
        "mean_accuracy":0.5,
        "val/time_since_best_loss":0.0,
        "val/time_since_best_accuracy":0.0,
        "lambada/time_since_best_loss":0.0,
        "lambada/time_since_best_accuracy":0.0}
        "#);
    }
}
