//! Downstream evaluations of a language-modelling task: which sets, how often, and in which batches.
//!
//! What is in a set is its plugin's business, how it is scored the host's.

use moeut_plugin_api::{ArgSpec, EvaluationRequest};
use serde::Deserialize;

/// Rows of [`args`].
pub const N_ARGS: usize = 18;

/// The table that fills [`Evaluations`], below `evaluations`. Whether anything is scored if nobody says so is a matter of
/// the task: `1` is the reference's default.
///
/// # Source
/// Reference code `tasks/lm_eval_mixin.py`; LAMBADA is on with the whole, as there.
pub const fn args(is_enabled: &'static str) -> [ArgSpec; N_ARGS] {
    [
        ArgSpec::flag("lm.eval.enabled", is_enabled)
            .field("evaluations.is_enabled")
            .help("Score LAMBADA, and the sets that are enabled below, with each validation"),
        set_flag("lm.eval.blimp.enabled", "1").field("evaluations.blimp.is_enabled"),
        set_flag("lm.eval.cbt.enabled", "0").field("evaluations.cbt.is_enabled"),
        set_flag("lm.eval.hellaswag.enabled", "0").field("evaluations.hellaswag.is_enabled"),
        set_flag("lm.eval.piqa.enabled", "0").field("evaluations.piqa.is_enabled"),
        set_flag("lm.eval.ai2arc.enabled", "0").field("evaluations.ai2arc.is_enabled"),
        multiplier("lm.eval.lambada.batch_mul", "1").field("evaluations.lambada.batch_multiplier"),
        multiplier("lm.eval.blimp.batch_mul", "16").field("evaluations.blimp.batch_multiplier"),
        multiplier("lm.eval.cbt.batch_mul", "1").field("evaluations.cbt.batch_multiplier"),
        multiplier("lm.eval.hellaswag.batch_mul", "16")
            .field("evaluations.hellaswag.batch_multiplier"),
        multiplier("lm.eval.piqa.batch_mul", "16").field("evaluations.piqa.batch_multiplier"),
        multiplier("lm.eval.ai2arc.batch_mul", "4").field("evaluations.ai2arc.batch_multiplier"),
        end_only("lm.eval.lambada.end_only", "0").field("evaluations.lambada.is_end_only"),
        end_only("lm.eval.blimp.end_only", "0").field("evaluations.blimp.is_end_only"),
        end_only("lm.eval.cbt.end_only", "1").field("evaluations.cbt.is_end_only"),
        end_only("lm.eval.hellaswag.end_only", "0").field("evaluations.hellaswag.is_end_only"),
        end_only("lm.eval.piqa.end_only", "0").field("evaluations.piqa.is_end_only"),
        end_only("lm.eval.ai2arc.end_only", "0").field("evaluations.ai2arc.is_end_only"),
    ]
}

const fn set_flag(name: &'static str, default: &'static str) -> ArgSpec {
    ArgSpec::flag(name, default).help("Score this set, too")
}

const fn multiplier(name: &'static str, default: &'static str) -> ArgSpec {
    ArgSpec::int(name, default)
        .help("Batch size of this set, as a multiple of that of the validation")
}

const fn end_only(name: &'static str, default: &'static str) -> ArgSpec {
    ArgSpec::flag(name, default).help("Score this set only after the last step")
}

/// Which sets are scored, and how.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluations {
    is_enabled: bool,
    lambada: Lambada,
    blimp: Set,
    cbt: Set,
    hellaswag: Set,
    piqa: Set,
    ai2arc: Set,
}

/// LAMBADA has no switch of its own.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Lambada {
    batch_multiplier: u64,
    is_end_only: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Set {
    is_enabled: bool,
    batch_multiplier: u64,
    is_end_only: bool,
}

impl Evaluations {
    /// What the host is asked to score.
    pub fn requests(&self) -> Vec<EvaluationRequest> {
        if !self.is_enabled {
            return Vec::new();
        }
        let request = |dataset: &str, batch_multiplier: u64, is_end_only| EvaluationRequest {
            dataset: dataset.into(),
            batch_multiplier: batch_multiplier.max(1),
            is_end_only,
        };
        let Lambada {
            batch_multiplier,
            is_end_only,
        } = self.lambada;
        let mut requests = vec![request("lambada", batch_multiplier, is_end_only)];
        for (name, set) in [
            ("blimp", &self.blimp),
            ("cbt", &self.cbt),
            ("hellaswag", &self.hellaswag),
            ("piqa", &self.piqa),
            ("ai2arc", &self.ai2arc),
        ] {
            if set.is_enabled {
                requests.push(request(name, set.batch_multiplier, set.is_end_only));
            }
        }
        requests
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Config {
        evaluations: Evaluations,
    }

    fn requests(given: &[(&str, &str)]) -> Vec<EvaluationRequest> {
        moeut_plugin_api::testing::config::<Config>(&args("1"), given)
            .evaluations
            .requests()
    }

    fn names(given: &[(&str, &str)]) -> Vec<String> {
        requests(given)
            .into_iter()
            .map(|request| request.dataset)
            .collect()
    }

    #[test]
    fn sets_are_those_of_the_reference_by_default() {
        assert_eq!(names(&[]), ["lambada", "blimp"]);
        assert_eq!(names(&[("lm.eval.blimp.enabled", "0")]), ["lambada"]);
        assert_eq!(names(&[("lm.eval.enabled", "0")]), [""; 0]);
    }

    #[test]
    fn children_s_books_wait_for_the_end() {
        let all = [
            ("lm.eval.cbt.enabled", "1"),
            ("lm.eval.hellaswag.enabled", "1"),
            ("lm.eval.piqa.enabled", "1"),
            ("lm.eval.ai2arc.enabled", "1"),
            ("lm.eval.ai2arc.batch_mul", "0"),
        ];
        let seen: Vec<_> = requests(&all)
            .into_iter()
            .map(|one| (one.dataset, one.batch_multiplier, one.is_end_only))
            .collect();
        let expected = [
            ("lambada", 1, false),
            ("blimp", 16, false),
            ("cbt", 1, true),
            ("hellaswag", 16, false),
            ("piqa", 16, false),
            ("ai2arc", 1, false),
        ];
        assert_eq!(
            seen,
            expected.map(|(name, multiplier, is_end_only)| (
                name.to_owned(),
                multiplier,
                is_end_only
            ))
        );
    }
}
