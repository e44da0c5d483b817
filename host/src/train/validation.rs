//! When a run validates, and under which names the scores are logged.
//!
//! ```text
//! validation/<stream>/<metric>        each `-test_interval` steps, and at the end
//! load_validation/<stream>/<metric>   after `-load_pretrained_model`
//! <stream>/<metric>                   `-test_only`, which prints them, too
//! ```
//! How a stream is scored is in [`super::evaluate`].

use super::TrainError;
use super::evaluate::{Scores, evaluate};
use super::run::Run;
use super::state::TrainState;
use super::timing::Phase;
use moeut_plugin_api::PluginError;

/// Scores by stream, in the task's order.
type AllScores = Vec<(String, Scores)>;

/// Validates. A signal ends it without scores; then the next start validates before it trains.
///
/// # Errors
/// If the data cannot be read, the model fails, or the last step was not finite.
pub fn validate(run: &mut Run) -> Result<(), TrainError> {
    run.monitor.settle(&mut run.state)?;
    run.state.owes_validation = true;
    if let Some(all) = score(run)? {
        run.state.owes_validation = false;
        let metrics = with_bests(&mut run.state, "validation/", &all);
        run.monitor.once(run.state.step, metrics);
    }
    Ok(())
}

/// Validates weights that were trained elsewhere; they do not count as this run's best.
///
/// # Errors
/// As [`validate`].
pub fn validate_pretrained(run: &mut Run) -> Result<(), TrainError> {
    if let Some(all) = score(run)? {
        let metrics = named("load_validation/", &all);
        run.monitor.once(run.state.step, metrics);
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
    let Some(all) = score(run)? else {
        return Ok(None);
    };
    let metrics = with_bests(&mut run.state, "", &all);
    let json = as_json(&metrics)?;
    run.monitor.once(run.state.step, metrics);
    Ok(Some(format!(
        "Validate returned:\n{json}\n{}\n",
        "-".repeat(80)
    )))
}

/// Scores every stream, unless a signal ends it.
fn score(run: &mut Run) -> Result<Option<AllScores>, TrainError> {
    run.monitor.enter(Phase::Validate);
    let mut all = Vec::new();
    for stream in &run.validation {
        let result = evaluate(
            &mut run.model,
            run.segments,
            stream,
            run.eval_batch_size,
            run.device,
            &run.signals,
        )?;
        let Some(scores) = result else {
            return Ok(None);
        };
        run.monitor
            .message(&sentence(run.state.step, &stream.name, &scores));
        all.push((stream.name.clone(), scores));
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

/// The metrics under their names, and the averages over the streams.
fn named(prefix: &str, all: &[(String, Scores)]) -> Vec<(String, f64)> {
    let mut metrics = Vec::new();
    for (stream, scores) in all {
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
    if !all.is_empty() {
        let mean = |of: fn(&Scores) -> f64| {
            all.iter().map(|(_, scores)| of(scores)).sum::<f64>() / all.len() as f64
        };
        metrics.extend([
            (format!("{prefix}mean_loss"), mean(|scores| scores.loss)),
            (
                format!("{prefix}mean_accuracy"),
                mean(|scores| scores.accuracy),
            ),
        ]);
    }
    metrics
}

/// As [`named`], and how many steps ago each stream was at its best.
fn with_bests(
    state: &mut TrainState,
    prefix: &str,
    all: &[(String, Scores)],
) -> Vec<(String, f64)> {
    let mut metrics = named(prefix, all);
    for (stream, scores) in all {
        let name = |metric: &str| format!("{prefix}{stream}/time_since_best_{metric}");
        metrics.extend([
            (name("loss"), state.note_loss(stream, scores.loss) as f64),
            (
                name("accuracy"),
                state.note_accuracy(stream, scores.accuracy) as f64,
            ),
        ]);
    }
    metrics
}

/// In the order given; JSON has no infinity and no NaN, so that both are `null`.
fn as_json(metrics: &[(String, f64)]) -> Result<String, PluginError> {
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

    fn scores(loss: f64, accuracy: f64) -> Scores {
        Scores {
            loss,
            accuracy,
            bits_per_byte: None,
        }
    }

    #[test]
    fn names_averages_and_bests() {
        let all = [
            ("val".to_owned(), scores(2.0, 0.25)),
            ("lambada".to_owned(), scores(4.0, 0.75)),
        ];
        let mut state = TrainState {
            step: 10,
            ..TrainState::default()
        };
        with_bests(&mut state, "validation/", &all);
        state.step = 30;
        let worse = [
            ("val".to_owned(), scores(2.5, 0.5)),
            ("lambada".to_owned(), scores(1.0, 0.5)),
        ];
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
}
