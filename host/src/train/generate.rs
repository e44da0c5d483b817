//! Continues a text with the model's own predictions, and hands it out as it comes.
//!
//! ```text
//! context   the prompt and what was drawn so far; the model predicts the token behind it
//! cache     a model that has one gets the context once and then token by token; another one gets it whole each time
//! window    the context never exceeds the length that the model was trained on: when it is full, only its newer half
//!           stays, and a cache starts afresh with that
//! ```
//! A model with rotary positions could go on with a cache beyond its trained length, but has never seen such distances.

use super::TrainError;
use super::sampling::Choice;
pub use super::sampling::Uniform;
use moeut_plugin_api::abi::client::{ModelClient, TokenDatasetClient};
use moeut_plugin_api::{ForwardInput, Past, PluginError, Wishes};
use moeut_torch::{IntoHandle, IntoTensor, OrPluginError};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// How to continue.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Tokens to add.
    pub length: usize,
    /// How each is chosen.
    pub choice: Choice,
    /// The length that the model was trained on.
    pub seq_len: usize,
}

/// What a continuation took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Effort {
    /// Tokens of the prompt that the model saw: the last ones, if they do not fit into its context.
    pub n_read: usize,
    /// Until the first token was drawn.
    pub read_time: Duration,
    /// Tokens that were drawn.
    pub n_drawn: usize,
    /// Between the first token and the last.
    pub draw_time: Duration,
}

/// Continues `prompt`; returns prompt and continuation as text.
///
/// # Errors
/// If the tokenizer or the model fails.
pub fn generate(
    model: &mut ModelClient,
    tokenizer: &TokenDatasetClient,
    prompt: &str,
    sampling: &Sampling,
    device: Device,
    uniform: &mut Uniform,
) -> Result<String, TrainError> {
    let mut text = String::new();
    stream(
        model,
        tokenizer,
        prompt,
        sampling,
        device,
        uniform,
        |piece| {
            text.push_str(piece);
            ControlFlow::Continue(())
        },
    )?;
    Ok(text)
}

/// As [`generate`], but the text goes to `show` piece by piece, the prompt first, until it says that it is enough.
///
/// # Errors
/// If the tokenizer or the model fails, or the prompt has no tokens.
pub fn stream(
    model: &mut ModelClient,
    tokenizer: &TokenDatasetClient,
    prompt: &str,
    sampling: &Sampling,
    device: Device,
    uniform: &mut Uniform,
    show: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Effort, TrainError> {
    let _no_grad = tch::no_grad_guard();
    let prompt = tokenizer.encode(prompt)?;
    if prompt.is_empty() {
        return Err(PluginError::new("there is nothing to continue")
            .why("the prompt has no tokens")
            .fix("give a text: `-prompt \"Once upon a time\"`")
            .into());
    }
    let has_cache = model.abilities()?.has_cache;
    let mut predictor = Client { model, device };
    let mut context = Context::new(prompt, sampling.seq_len, has_cache);
    let decode = |ids: &[i32]| tokenizer.decode(ids);
    Ok(continued(
        &mut predictor,
        &mut context,
        decode,
        sampling,
        uniform,
        show,
    )?)
}

/// The loop behind [`stream`], which needs no plugins.
fn continued(
    predictor: &mut impl Predictor,
    context: &mut Context,
    decode: impl Fn(&[i32]) -> Result<String, PluginError>,
    sampling: &Sampling,
    uniform: &mut Uniform,
    mut show: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Effort, PluginError> {
    let mut effort = Effort::default();
    let mut shown = Shown::default();
    if show(shown.settled(decode(&context.ids)?)).is_break() {
        return Ok(effort);
    }
    let mut clock = Instant::now();
    for index in 0..sampling.length {
        let logits_v = context.predict(predictor)?;
        let n_read = context.ids.len() - context.start;
        context.ids.push(sampling.choice.draw(&logits_v, uniform)?);
        effort.n_drawn += 1;
        if index == 0 {
            (effort.n_read, effort.read_time) = (n_read, clock.elapsed());
            clock = Instant::now();
        }
        effort.draw_time = clock.elapsed();
        if show(shown.settled(decode(&context.ids)?)).is_break() {
            return Ok(effort);
        }
    }
    let _ = show(shown.rest(decode(&context.ids)?));
    Ok(effort)
}

/// Something that predicts the token behind others.
trait Predictor {
    /// One logit for each id of the vocabulary.
    fn predict(&mut self, ids: &[i32], past: Past) -> Result<Vec<f64>, PluginError>;
}

struct Client<'a> {
    model: &'a mut ModelClient,
    device: Device,
}

impl Predictor for Client<'_> {
    fn predict(&mut self, ids: &[i32], past: Past) -> Result<Vec<f64>, PluginError> {
        let tokens_tb = Tensor::from_slice(ids)
            .to_kind(Kind::Int64)
            .unsqueeze(1)
            .to_device(self.device);
        let output = self.model.forward(ForwardInput {
            tokens_tb: tokens_tb.share(),
            is_training: false,
            wishes: Wishes::default(),
            past,
        })?;
        let logits_tbv = output.logits_tbv.into_tensor();
        logits_tbv
            .f_get(-1)
            .and_then(|last_bv| last_bv.f_get(0)?.f_to_kind(Kind::Double))
            .and_then(|logits_v| Vec::try_from(&logits_v))
            .or_plugin_error("the model's prediction cannot be read")
    }
}

/// Tokens that stay when a context of `seq_len` tokens is full.
pub fn n_remembered(seq_len: usize) -> usize {
    (seq_len / 2).max(1)
}

/// All tokens so far, and what the model knows of them.
struct Context {
    ids: Vec<i32>,
    seq_len: usize,
    has_cache: bool,
    /// The first token that the model sees.
    start: usize,
    /// Up to where the cache has been filled; at `start` if it is empty.
    n_cached: usize,
}

impl Context {
    /// No more than this model's cache is used at a time.
    const SLOT: u32 = 0;

    fn new(ids: Vec<i32>, seq_len: usize, has_cache: bool) -> Self {
        Self {
            ids,
            seq_len,
            has_cache,
            start: 0,
            n_cached: 0,
        }
    }

    fn predict(&mut self, predictor: &mut impl Predictor) -> Result<Vec<f64>, PluginError> {
        let end = self.ids.len();
        if end - self.start > self.seq_len {
            self.start = end - n_remembered(self.seq_len);
            self.n_cached = self.start;
        }
        if !self.has_cache {
            return predictor.predict(&self.ids[self.start..], Past::None);
        }
        let past = Past::Cache {
            slot: Self::SLOT,
            is_reset: self.n_cached == self.start,
        };
        let logits_v = predictor.predict(&self.ids[self.n_cached..], past)?;
        self.n_cached = end;
        Ok(logits_v)
    }
}

/// The part of the text that has been handed out.
#[derive(Default)]
struct Shown(String);

impl Shown {
    /// What of `text`, the decoding of all tokens, is new and will not change: the last character may be incomplete,
    /// which shows as U+FFFD. Where a tokenizer changes what was handed out, nothing can be added until it agrees again.
    fn settled(&mut self, mut text: String) -> &str {
        text.truncate(text.trim_end_matches(char::REPLACEMENT_CHARACTER).len());
        self.advance(text)
    }

    /// All that is new at the end.
    fn rest(&mut self, text: String) -> &str {
        self.advance(text)
    }

    fn advance(&mut self, text: String) -> &str {
        let from = self.0.len();
        if text.starts_with(&self.0) {
            self.0 = text;
        }
        &self.0[from..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N_IDS: i32 = 50;

    /// A model whose prediction depends on every token of its context and on their order. Its cache is the context.
    #[derive(Default)]
    struct Toy {
        cache: Vec<i32>,
        /// Tokens of each call, and whether the cache was emptied.
        calls: Vec<(usize, bool)>,
    }

    impl Predictor for Toy {
        fn predict(&mut self, ids: &[i32], past: Past) -> Result<Vec<f64>, PluginError> {
            let is_reset = match past {
                Past::Cache { is_reset, .. } => is_reset,
                Past::None | Past::Segments { .. } | Past::Fork { .. } => true,
            };
            if is_reset {
                self.cache.clear();
            }
            self.cache.extend(ids);
            self.calls.push((ids.len(), is_reset));
            let hash = self.cache.iter().fold(7_i64, |hash, &id| {
                (hash * 31 + i64::from(id) + 1) % 1_000_003
            });
            let logit = |id: i32| f64::from(i32::try_from(hash * i64::from(id + 3) % 97).unwrap());
            Ok((0..N_IDS).map(|id| logit(id) / 20.0).collect())
        }
    }

    fn sampling(length: usize, temperature: f64, seq_len: usize) -> Sampling {
        Sampling {
            length,
            choice: Choice {
                temperature,
                top_k: None,
                top_p: 1.0,
            },
            seq_len,
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "the signature of a tokenizer")]
    fn decode(ids: &[i32]) -> Result<String, PluginError> {
        let words: Vec<String> = ids.iter().map(i32::to_string).collect();
        Ok(words.join(" "))
    }

    fn run(
        has_cache: bool,
        n_prompt: i32,
        sampling: &Sampling,
        seed: u64,
    ) -> (Toy, String, Effort) {
        let mut toy = Toy::default();
        let mut context = Context::new((0..n_prompt).collect(), sampling.seq_len, has_cache);
        let mut text = String::new();
        let show = |piece: &str| {
            text.push_str(piece);
            ControlFlow::Continue(())
        };
        let mut uniform = Uniform::new(seed);
        let effort = continued(&mut toy, &mut context, decode, sampling, &mut uniform, show);
        (toy, text, effort.unwrap())
    }

    #[test]
    fn a_cache_changes_no_text_also_when_the_window_is_full() {
        for (n_prompt, length, seq_len) in [(5, 20, 100), (5, 40, 12), (30, 10, 12), (3, 9, 1)] {
            for temperature in [0.0, 1.0] {
                let sampling = sampling(length, temperature, seq_len);
                let (_, cached, _) = run(true, n_prompt, &sampling, 1);
                let (_, whole, _) = run(false, n_prompt, &sampling, 1);
                assert_eq!(cached, whole, "{sampling:?}");
                assert_eq!(
                    cached.split(' ').count(),
                    usize::try_from(n_prompt).unwrap() + length
                );
            }
        }
    }

    #[test]
    fn a_cache_gets_the_prompt_once_and_then_token_by_token() {
        let (toy, _, effort) = run(true, 5, &sampling(4, 1.0, 100), 1);
        assert_eq!(toy.calls, [(5, true), (1, false), (1, false), (1, false)]);
        assert_eq!((effort.n_read, effort.n_drawn), (5, 4));
        let (toy, ..) = run(false, 5, &sampling(4, 1.0, 100), 1);
        assert_eq!(toy.calls, [(5, true), (6, true), (7, true), (8, true)]);
    }

    #[test]
    fn only_what_the_model_read_counts_as_read() {
        assert_eq!(run(true, 30, &sampling(4, 1.0, 12), 1).2.n_read, 6);
    }

    /// A context of six tokens: of seven the last three stay.
    #[test]
    fn a_full_window_forgets_its_older_half() {
        let (toy, ..) = run(true, 5, &sampling(7, 1.0, 6), 1);
        let expected = [
            (5, true),
            (1, false),
            (3, true),
            (1, false),
            (1, false),
            (1, false),
            (3, true),
        ];
        assert_eq!(toy.calls, expected);
    }

    #[test]
    fn a_seed_fixes_the_text() {
        let text = |seed| run(true, 5, &sampling(20, 1.0, 100), seed).1;
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }

    #[test]
    fn it_ends_when_nobody_listens_any_more() {
        let mut toy = Toy::default();
        let mut context = Context::new(vec![1, 2], 100, true);
        let mut n_pieces = 0;
        let show = |_: &str| {
            n_pieces += 1;
            if n_pieces < 3 {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        };
        let mut uniform = Uniform::new(1);
        let sampling = sampling(20, 1.0, 100);
        continued(
            &mut toy,
            &mut context,
            decode,
            &sampling,
            &mut uniform,
            show,
        )
        .unwrap();
        assert_eq!(toy.calls.len(), 2);
    }

    #[test]
    fn incomplete_characters_wait_for_their_other_bytes() {
        let mut shown = Shown::default();
        let mut give = |text: &str| shown.settled(text.to_owned()).to_owned();
        assert_eq!(give("The"), "The");
        assert_eq!(give("The \u{fffd}"), " ");
        assert_eq!(give("The \u{fffd}\u{fffd}"), "");
        assert_eq!(give("The 😀"), "😀");
        assert_eq!(give("A 😀"), ""); // Not what was shown: nothing can be taken back.
        assert_eq!(give("The 😀 is"), " is");
        assert_eq!(give("The 😀 is\u{fffd}"), "");
        assert_eq!(shown.rest("The 😀 is\u{fffd}".to_owned()), "\u{fffd}");
    }
}
