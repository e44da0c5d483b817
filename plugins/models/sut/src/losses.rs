//! Auxiliary losses of a router: what one layer gathers over its applications, and the four terms at the end.
//!
//! Shape letters: `N` tokens of one application, `E` experts.

use serde::Deserialize;
use tch::{Device, Kind, Tensor};

/// Weights of the four losses; 0 turns one off.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LossWeights {
    pub(crate) cv: f64,
    pub(crate) switch: f64,
    pub(crate) z: f64,
    pub(crate) mi: f64,
}

/// Which formula `miloss` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MiFormula {
    /// Minus the mutual information of token and expert.
    MutualInformation,
    /// The reference's: the sum of both entropies, and without halting weights too small by the number of experts.
    Reference,
}

/// What a gate decided for the tokens of one application, halted ones included.
pub(crate) struct Decision<'a> {
    /// Before the softmax, `[N, E]`.
    pub(crate) logits_ne: &'a Tensor,
    /// After it, `[N, E]`.
    pub(crate) p_ne: &'a Tensor,
    /// Its logarithm, `[N, E]`; only read if [`Tally::reads_logarithms`].
    pub(crate) log_p_ne: Option<&'a Tensor>,
    /// Makes what each expert's output is multiplied by, `[N, E]`; 0 for those not selected and for halted tokens.
    pub(crate) gate_ne: &'a dyn Fn() -> Tensor,
    /// How much of a token has not halted, `[N, 1]`; nothing counts as 1.
    pub(crate) alive_n1: Option<&'a Tensor>,
}

/// Sums over all applications of one layer in a forward pass; only those that a term needs are made.
///
/// ```text
/// cv     = var(m) / (mean(m)² + 1e-10)       m = share of each expert in the gates; unbiased variance
/// switch = E · Σ_e p̂_e · f̂_e                 shares of the probabilities, and of the selections
/// z      = mean over tokens of (ln Σ_e exp(logit_e))²
/// mi     = Σ_e p_e ln p_e − Σ_n u_n Σ_e p_ne ln p_ne,     p_e = Σ_n u_n p_ne
/// ```
///
/// with token weights `u = alive / Σ alive`, over the tokens of all applications; nats. `mi` is H(expert | token) −
/// H(expert): low if each token is sure of its experts and all experts are used alike.
///
/// The reference *adds* the two entropies, so that it rewards uneven use, and weights tokens by `1 / (N · E)` where
/// nothing can halt; [`MiFormula::Reference`] repeats that. Test: `both_formulas_of_mi`.
///
/// # Source
/// Tan et al., "Sparse Universal Transformer", arXiv:2310.07096; reference `sut/parallel_linear/moe.py`.
#[derive(Debug)]
pub(crate) struct Tally {
    weights: LossWeights,
    formula: MiFormula,
    wants_counts: bool,
    can_halt: bool,
    sums: Vec<Sums>,
}

/// Of one application.
#[derive(Debug)]
struct Sums {
    n_tokens: i64,
    options: (Kind, Device),
    mass_e: Option<Tensor>,
    p_e: Option<Tensor>,
    n_selected_e: Option<Tensor>,
    log_z_squared: Option<Tensor>,
    mi: Option<MiSums>,
}

/// Sums over tokens, weighted by how alive they are.
#[derive(Debug)]
struct MiSums {
    alive: Tensor,
    p_e: Tensor,
    p_log_p: Tensor,
}

/// A term's name in the reference, its weight, and how it is computed.
type Term<'a> = (&'static str, f64, &'a dyn Fn() -> Option<Tensor>);

impl Tally {
    /// With `wants_counts`, [`Self::counts`] has an answer.
    pub(crate) fn new(weights: LossWeights, formula: MiFormula, wants_counts: bool) -> Self {
        Self {
            weights,
            formula,
            wants_counts,
            can_halt: false,
            sums: Vec::new(),
        }
    }

    /// Whether a term needs the logarithms of the probabilities.
    pub(crate) fn reads_logarithms(&self) -> bool {
        self.weights.mi > 0.0
    }

    /// Adds one application.
    pub(crate) fn add(&mut self, decision: &Decision) {
        let &Decision {
            logits_ne,
            p_ne,
            log_p_ne,
            gate_ne,
            alive_n1,
        } = decision;
        self.can_halt |= alive_n1.is_some();
        let LossWeights { cv, switch, z, .. } = self.weights;
        let counts = self.wants_counts || switch > 0.0;
        let gate_ne = (cv > 0.0 || counts).then(gate_ne);
        let of_the_alive = |x_ne: &Tensor| match alive_n1 {
            Some(alive_n1) => x_ne.masked_fill(&alive_n1.eq(0.0), 0.0),
            None => x_ne.shallow_clone(),
        };
        self.sums.push(Sums {
            n_tokens: p_ne.size()[0],
            options: (p_ne.kind(), p_ne.device()),
            mass_e: gate_ne.as_ref().filter(|_| cv > 0.0).map(over_tokens),
            p_e: (switch > 0.0).then(|| over_tokens(&of_the_alive(p_ne))),
            n_selected_e: gate_ne
                .filter(|_| counts)
                .map(|gate_ne| over_tokens(&gate_ne.gt(0.0).to_kind(p_ne.kind()))),
            // A halted token's logits count as 0.
            log_z_squared: (z > 0.0).then(|| {
                let log_z_n = of_the_alive(logits_ne).logsumexp(-1, false);
                log_z_n.square().sum(None)
            }),
            mi: log_p_ne
                .filter(|_| self.reads_logarithms())
                .map(|log_p_ne| {
                    let alive_n1 = alive_n1.map_or_else(
                        || p_ne.narrow(1, 0, 1).ones_like(),
                        |alive| alive.to_kind(p_ne.kind()),
                    );
                    let weighted_ne = &alive_n1 * p_ne;
                    MiSums {
                        alive: alive_n1.sum(None),
                        p_log_p: (&weighted_ne * log_p_ne).sum(None),
                        p_e: over_tokens(&weighted_ne),
                    }
                }),
        });
    }

    /// How often each expert was selected with a gate above 0, `[E]`; nothing if there was no application, or if nobody
    /// wants it.
    pub(crate) fn counts(&self) -> Option<Tensor> {
        self.total(|sums| sums.n_selected_e.as_ref())
    }

    /// The weighted terms by their names in the reference; 0 where the weight is 0, nothing without applications.
    pub(crate) fn finish(&self) -> Vec<(&'static str, Tensor)> {
        let Some(options) = self.sums.first().map(|sums| sums.options) else {
            return Vec::new();
        };
        let LossWeights { cv, switch, z, mi } = self.weights;
        let n_tokens: i64 = self.sums.iter().map(|sums| sums.n_tokens).sum();
        let mean_log_z_squared = || {
            let sum = self.total(|sums| sums.log_z_squared.as_ref())?;
            Some(sum / n_tokens as f64)
        };
        let balance = || {
            let p_e = self.total(|sums| sums.p_e.as_ref())?;
            let n_experts = p_e.size()[0] as f64;
            Some((shares(&p_e) * shares(&self.counts()?)).sum(None) * n_experts)
        };
        let variation = || {
            let mass_e = self.total(|sums| sums.mass_e.as_ref())?;
            Some(squared_variation(&shares(&mass_e)))
        };
        let terms: [Term; 4] = [
            ("cvloss", cv, &variation),
            ("switchloss", switch, &balance),
            ("zloss", z, &mean_log_z_squared),
            ("miloss", mi, &|| self.mi()),
        ];
        let weighted = |(name, weight, value): Term| {
            let value = if weight > 0.0 { value() } else { None };
            let zero = || Tensor::zeros([0i64; 0], options);
            (name, value.map_or_else(zero, |value| value * weight))
        };
        terms.into_iter().map(weighted).collect()
    }

    fn mi(&self) -> Option<Tensor> {
        let sum = |part: fn(&MiSums) -> &Tensor| self.total(|sums| sums.mi.as_ref().map(part));
        let weighted_e = sum(|mi| &mi.p_e)?;
        let n_experts = weighted_e.size()[0] as f64;
        let alive = sum(|mi| &mi.alive)? + 1e-12;
        let (sign, alive) = match self.formula {
            MiFormula::MutualInformation => (1.0, alive),
            MiFormula::Reference if self.can_halt => (-1.0, alive),
            MiFormula::Reference => (-1.0, alive * n_experts),
        };
        let p_e = weighted_e / &alive;
        let p_log_p = sum(|mi| &mi.p_log_p)? / alive;
        Some((&p_e * p_e.log()).sum(None) * sign - p_log_p)
    }

    /// The sum of one part over all applications, if it was gathered.
    fn total<'a>(&'a self, part: impl Fn(&'a Sums) -> Option<&'a Tensor>) -> Option<Tensor> {
        let mut parts = self.sums.iter().filter_map(part);
        let first = parts.next()?.shallow_clone();
        Some(parts.fold(first, |sum, part| sum + part))
    }
}

fn over_tokens(x_ne: &Tensor) -> Tensor {
    x_ne.sum_dim_intlist(0i64, false, None)
}

/// `x / Σ x` of numbers that are not negative.
fn shares(x_e: &Tensor) -> Tensor {
    x_e / x_e.sum(None).clamp_min(1e-12)
}

/// Squared coefficient of variation; 0 of a single number.
fn squared_variation(x_e: &Tensor) -> Tensor {
    if x_e.size()[0] == 1 {
        return x_e.sum(Kind::Float).zeros_like();
    }
    x_e.var(true) / (x_e.mean(None).square() + 1e-10)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);
    const ALL: LossWeights = LossWeights {
        cv: 1.0,
        switch: 1.0,
        z: 1.0,
        mi: 1.0,
    };

    fn add(tally: &mut Tally, logits_ne: &Tensor, gate_ne: &Tensor, alive_n1: Option<&Tensor>) {
        tally.add(&Decision {
            logits_ne,
            p_ne: &logits_ne.softmax(-1, None),
            log_p_ne: Some(&logits_ne.log_softmax(-1, None)),
            gate_ne: &|| gate_ne.shallow_clone(),
            alive_n1,
        });
    }

    fn terms(tally: &Tally) -> Vec<f64> {
        let terms = tally.finish();
        assert!(terms.iter().map(|(name, _)| *name).eq([
            "cvloss",
            "switchloss",
            "zloss",
            "miloss"
        ]));
        terms
            .iter()
            .map(|(_, term)| term.double_value(&[]))
            .collect()
    }

    fn assert_close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    }

    /// Two tokens with probabilities (3/4, 1/4) and (1/4, 3/4), each routed to its better expert with gate 1.
    #[test]
    fn a_case_by_hand() {
        let logits = Tensor::from_slice2(&[[3f64.ln(), 0.0], [0.0, 3f64.ln()]]);
        let gates = Tensor::eye(2, DOUBLE);
        let mut tally = Tally::new(ALL, MiFormula::MutualInformation, true);
        add(&mut tally, &logits, &gates, None);
        let conditional = -(0.75 * 0.75f64.ln() + 0.25 * 0.25f64.ln());
        let [cv, switch, z, mi] = terms(&tally)[..] else {
            panic!("four terms")
        };
        assert_close(cv, 0.0);
        assert_close(switch, 1.0);
        assert_close(z, 4f64.ln().powi(2));
        assert_close(mi, conditional - 2f64.ln());
        assert_eq!(
            Vec::<f64>::try_from(tally.counts().unwrap()).unwrap(),
            [1.0, 1.0]
        );
    }

    /// All tokens to one of four experts: shares (1, 0, 0, 0) have mean 1/4 and unbiased variance 1/4.
    #[test]
    fn one_sided_use_is_what_cv_and_switch_punish() {
        let logits = Tensor::from_slice2(&[[50.0, 0.0, 0.0, 0.0]; 3]);
        let gates = Tensor::from_slice2(&[[1.0, 0.0, 0.0, 0.0]; 3]);
        let mut tally = Tally::new(ALL, MiFormula::MutualInformation, true);
        add(&mut tally, &logits, &gates, None);
        let terms = terms(&tally);
        assert!((terms[0] - 4.0).abs() < 1e-7, "{terms:?}");
        assert_close(terms[1], 4.0);
    }

    /// Without halting: H(e|x) − H(e) against (H(e') + H(e|x) / E), where e' has the reference's mass of 1 / E.
    #[test]
    fn both_formulas_of_mi() {
        let logits = Tensor::from_slice2(&[[3f64.ln(), 0.0], [0.0, 3f64.ln()]]);
        let gates = Tensor::eye(2, DOUBLE);
        let conditional = -(0.75 * 0.75f64.ln() + 0.25 * 0.25f64.ln());
        let mi = |formula, alive: Option<&Tensor>| {
            let mut tally = Tally::new(ALL, formula, true);
            add(&mut tally, &logits, &gates, alive);
            terms(&tally)[3]
        };
        assert_close(
            mi(MiFormula::MutualInformation, None),
            conditional - 2f64.ln(),
        );
        assert_close(
            mi(MiFormula::Reference, None),
            0.5 * 4f64.ln() + conditional / 2.0,
        );
        // With halting weights the tokens' weights add up to one, and both entropies are summed.
        let alive = Tensor::from_slice(&[0.5, 0.5]).view([2, 1]);
        assert_close(
            mi(MiFormula::Reference, Some(&alive)),
            2f64.ln() + conditional,
        );
        assert_close(
            mi(MiFormula::MutualInformation, Some(&alive)),
            conditional - 2f64.ln(),
        );
    }

    /// A token that has halted has no say in `mi`; one that half halted has half a say.
    #[test]
    fn tokens_count_as_far_as_they_are_alive() {
        let options = DOUBLE;
        let logits = Tensor::randn([3, 4], options);
        let gates = Tensor::zeros([3, 4], options);
        let mi = |rows: &[i64], alive: &[f64]| {
            let rows = Tensor::from_slice(rows);
            let n = rows.size()[0];
            let mut tally = Tally::new(ALL, MiFormula::MutualInformation, true);
            add(
                &mut tally,
                &logits.index_select(0, &rows),
                &gates.index_select(0, &rows),
                Some(&Tensor::from_slice(alive).view([n, 1])),
            );
            terms(&tally)[3]
        };
        assert_close(
            mi(&[0, 1, 2], &[1.0, 0.5, 0.0]),
            mi(&[0, 0, 1], &[0.5, 0.5, 0.5]),
        );
    }

    /// Two applications are one with twice the tokens; the one without halting counts its tokens as 1.
    #[test]
    fn applications_add_up() {
        let (a, b) = (Tensor::randn([3, 4], DOUBLE), Tensor::randn([3, 4], DOUBLE));
        let gates = Tensor::rand([3, 4], DOUBLE);
        let alive = Tensor::rand([3, 1], DOUBLE);
        for formula in [MiFormula::MutualInformation, MiFormula::Reference] {
            let mut apart = Tally::new(ALL, formula, true);
            add(&mut apart, &a, &gates, None);
            add(&mut apart, &b, &gates, Some(&alive));
            let mut together = Tally::new(ALL, formula, true);
            add(
                &mut together,
                &Tensor::cat(&[&a, &b], 0),
                &Tensor::cat(&[&gates, &gates], 0),
                Some(&Tensor::cat(&[&alive.ones_like(), &alive], 0)),
            );
            for (a, b) in terms(&apart).into_iter().zip(terms(&together)) {
                assert_close(a, b);
            }
        }
    }

    #[test]
    fn a_weight_of_zero_gives_zero() {
        let off = LossWeights {
            cv: 0.0,
            switch: 0.0,
            z: 0.0,
            mi: 0.0,
        };
        let mut tally = Tally::new(off, MiFormula::MutualInformation, false);
        assert!(tally.finish().is_empty());
        let logits = Tensor::randn([3, 4], DOUBLE);
        add(&mut tally, &logits, &logits, None);
        assert_eq!(terms(&tally), [0.0; 4]);
    }
}
