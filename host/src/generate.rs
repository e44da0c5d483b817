//! `moeut-host generate`: a trained model continues a text, which goes to stdout as it comes.
//!
//! Arguments are those of the checkpoint unless the command line says otherwise. Nothing is written and nothing locked,
//! so a run that is still training can be asked, too. How texts are continued is in [`crate::train::generate`].

use crate::args::{Arguments, HostConfig, Source, asks_for_help, parse};
use crate::cli::{open_registry, print, warn_about_plugins};
use crate::error::HostError;
use crate::log::{Level, Terminal};
use crate::plan::candidates;
use crate::plugins::Registry;
use crate::train::build::{Blueprint, sampling, seed_of_the_clock, size};
use crate::train::generate::{Effort, Sampling, Uniform, n_remembered, stream};
use crate::trained::{self, Trained};
use moeut_plugin_api::PluginError;
use moeut_plugin_api::abi::client::{ModelClient, TokenDatasetClient};
use std::io::{ErrorKind, Write};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;
use tch::Device;

const USAGE: &str = "\
usage: moeut-host generate -restore <checkpoint or run folder> -prompt <text> [-<argument> <value> …]
       moeut-host generate -name <name> -prompt <text> [-<argument> <value> …]

  -sample_length <int>                Tokens to add
  -sample_temperature <float>         0 takes the likeliest token
  -sample_top_k <int>                 Choose among so many likeliest tokens
  -sample_top_p <float>               And among the likeliest of these that have this share of the probability
  -seed <int>                         Fixes the text; else it is another one each time

Other arguments are those of the checkpoint. The text goes to stdout, everything else to stderr.
";

/// Runs the command; `argv` is what follows `generate`.
///
/// # Errors
/// If there is no checkpoint or no prompt, or the checkpoint does not fit the plugins that are there.
pub fn command(argv: &[String], terminal: &Arc<Terminal>) -> Result<(), HostError> {
    if asks_for_help(argv) {
        print(USAGE);
        return Ok(());
    }
    let registry = Arc::new(open_registry(argv)?);
    warn_about_plugins(&registry, terminal);
    let (blueprint, prompt) = blueprint(argv, &registry, terminal)?;
    for warning in &blueprint.arguments.warnings {
        terminal.message(Level::Warning, warning);
    }
    let seed = seed(&blueprint);
    let mut speaker = Speaker::new(&blueprint, &registry, terminal)?;
    terminal.finish();
    speaker.warn_about_window(&prompt, terminal)?;
    let effort = speaker.speak(&prompt, &mut Uniform::new(seed))?;
    if let Some(effort) = effort {
        terminal.message(Level::Info, &format!("{}, seed {seed}", describe(&effort)));
    }
    Ok(())
}

/// The arguments of the checkpoint, with those of the command line over them; and the prompt.
fn blueprint(
    argv: &[String],
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<(Blueprint, String), HostError> {
    // A first reading says which checkpoint; then its arguments join in.
    let first = HostConfig::new(&parse(argv, &candidates(argv, registry)?, None)?)?;
    let folder = trained::checkpoint_folder(&first)?;
    let prompt = first.prompt.ok_or_else(|| {
        HostError::new(
            "there is nothing to continue",
            "`-prompt` is missing or blank",
            "add a text: `-prompt \"Once upon a time\"`",
        )
    })?;
    let blueprint = trained::blueprint(argv, folder, &[], registry, terminal)?;
    Ok((blueprint, prompt))
}

/// The seed of this command line. That of the training, which the checkpoint knows, is none: asking twice is to give
/// two texts.
fn seed(blueprint: &Blueprint) -> u64 {
    let own = blueprint
        .config
        .seed
        .filter(|_| has_own_seed(&blueprint.arguments));
    // Short enough to be typed again.
    own.map_or_else(|| seed_of_the_clock() % 1_000_000, i64::cast_unsigned)
}

fn has_own_seed(arguments: &Arguments) -> bool {
    let raw = arguments.raw.get("seed");
    raw.is_some_and(|(_, source)| *source == Source::CommandLine)
}

/// A model with trained weights, and its tokenizer.
struct Speaker {
    model: ModelClient,
    tokenizer: Arc<TokenDatasetClient>,
    device: Device,
    sampling: Sampling,
}

impl Speaker {
    fn new(
        blueprint: &Blueprint,
        registry: &Arc<Registry>,
        terminal: &Arc<Terminal>,
    ) -> Result<Self, PluginError> {
        let trained = Trained::open(blueprint, registry, terminal, &Arc::default())?;
        Ok(Self {
            model: trained.model,
            tokenizer: trained.tokenizer,
            device: trained.device,
            sampling: sampling(&blueprint.config.sample, size(trained.plan.train.seq_len)?),
        })
    }

    /// What the user may not expect of a long text.
    fn warn_about_window(&self, prompt: &str, terminal: &Terminal) -> Result<(), PluginError> {
        let n_prompt = self.tokenizer.encode(prompt)?.len();
        let Sampling {
            length, seq_len, ..
        } = self.sampling;
        if n_prompt + length > seq_len + 1 {
            let text = format!(
                "{n_prompt} tokens of prompt and {length} more exceed the context of {seq_len} that the model was \
                 trained on: whenever it is full, all but its last {} are forgotten",
                n_remembered(seq_len)
            );
            terminal.message(Level::Warning, &text);
        }
        Ok(())
    }

    /// Continues `prompt` on stdout; nothing comes back if nobody reads it to its end.
    fn speak(&mut self, prompt: &str, uniform: &mut Uniform) -> Result<Option<Effort>, HostError> {
        let mut stdout = std::io::stdout().lock();
        let mut written = Ok(());
        let effort = stream(
            &mut self.model,
            &self.tokenizer,
            prompt,
            &self.sampling,
            self.device,
            uniform,
            |piece| {
                written = stdout
                    .write_all(piece.as_bytes())
                    .and_then(|()| stdout.flush());
                match written {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            },
        )?;
        let written = written
            .and_then(|()| stdout.write_all(b"\n"))
            .and_then(|()| stdout.flush());
        match written {
            Ok(()) => Ok(Some(effort)),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(None),
            Err(error) => Err(HostError::new(
                "the text cannot be written",
                error.to_string(),
                "check where stdout leads, and the free space there",
            )),
        }
    }
}

/// `12 tokens read at 300 tokens/s, 99 drawn at 80 tokens/s`.
fn describe(effort: &Effort) -> String {
    let speed = |n: usize, time: Duration| n as f64 / time.as_secs_f64().max(1e-9);
    let read = format!(
        "{} tokens read at {:.0} tokens/s",
        effort.n_read,
        speed(effort.n_read, effort.read_time)
    );
    // The first token comes with the reading of the prompt.
    if effort.n_drawn < 2 {
        return read;
    }
    format!(
        "{read}, {} drawn at {:.0} tokens/s",
        effort.n_drawn,
        speed(effort.n_drawn - 1, effort.draw_time)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Owner;

    fn arguments(line: &str, stored: &[(&str, &str)]) -> Arguments {
        let argv: Vec<String> = line.split_whitespace().map(String::from).collect();
        let stored = stored
            .iter()
            .map(|&(name, raw)| (name.to_owned(), raw.to_owned()))
            .collect();
        parse(&argv, &[Owner::host()], Some(&stored)).unwrap()
    }

    #[test]
    fn the_seed_of_the_training_is_not_that_of_the_text() {
        let own = |line| has_own_seed(&arguments(line, &[("seed", "1")]));
        assert!(own("-seed 1"));
        assert!(!own(""));
    }

    #[test]
    fn speeds_are_told_apart() {
        let mut effort = Effort {
            n_read: 12,
            read_time: Duration::from_millis(40),
            n_drawn: 5,
            draw_time: Duration::from_millis(50),
        };
        assert_eq!(
            describe(&effort),
            "12 tokens read at 300 tokens/s, 5 drawn at 80 tokens/s"
        );
        effort.n_drawn = 1;
        assert_eq!(describe(&effort), "12 tokens read at 300 tokens/s");
    }
}
