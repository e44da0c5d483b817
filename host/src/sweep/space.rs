//! What a parameter of a sweep may be: the distributions of W&B, as texts for a command line.
//!
//! ```text
//! value                        constant
//! values [probabilities]       categorical[_w_probabilities]
//! min max                      int_uniform (both whole), else uniform
//! distribution: [q_]uniform [q_]log_uniform[_values] (min max)   [q_]normal [q_]log_normal (mu = 0, sigma = 1)
//! ```
//! `log_uniform` takes the logarithms of the ends, `log_uniform_values` the ends; `q` rounds to multiples of itself (half
//! to even) and is 1 if absent. Each distribution is its quantile function, so that one uniform number makes one value.
//!
//! # Source
//! `params.py` and `grid_search.py` of W&B's sweep engine (`sweeps` 0.3.0 of `PyPI`). Left out: `beta` and `inv_log_uniform`.

use moeut_plugin_api::PluginError;
use moeut_torch::OrPluginError;
use tch::Tensor;

/// The values that a parameter may have.
#[derive(Debug, Clone, PartialEq)]
pub enum Domain {
    /// One.
    Fixed(String),
    /// Each as likely as the others.
    Values(Vec<String>),
    /// With their probabilities.
    Weighted(Vec<(String, f64)>),
    /// Both ends included.
    Integers {
        /// Smallest.
        min: i64,
        /// Largest.
        max: i64,
    },
    /// Real numbers.
    Real {
        /// How they are distributed.
        shape: Shape,
        /// Rounded to multiples of this.
        q: Option<f64>,
    },
}

/// A distribution of real numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shape {
    /// Between the ends.
    Uniform {
        /// Smallest.
        min: f64,
        /// Largest.
        max: f64,
    },
    /// The logarithm is uniform between the ends.
    LogUniform {
        /// Logarithm of the smallest.
        min: f64,
        /// Logarithm of the largest.
        max: f64,
    },
    /// Gaussian.
    Normal {
        /// Mean.
        mu: f64,
        /// Standard deviation.
        sigma: f64,
    },
    /// The logarithm is Gaussian.
    LogNormal {
        /// Mean of the logarithm.
        mu: f64,
        /// Standard deviation of the logarithm.
        sigma: f64,
    },
}

impl Domain {
    /// The values of a grid in their order, each once; nothing for a distribution that a grid cannot have.
    ///
    /// `q_uniform` is `min`, `min + q`, … below `max`, as W&B has it.
    pub fn grid(&self) -> Option<Vec<String>> {
        let all: Vec<String> = match self {
            Self::Fixed(value) => vec![value.clone()],
            Self::Values(values) => values.clone(),
            Self::Integers { min, max } => (*min..=*max).map(|value| value.to_string()).collect(),
            Self::Real {
                shape: Shape::Uniform { min, max },
                q: Some(q),
            } => (0_u32..=u32::MAX)
                .map(|index| min + f64::from(index) * q)
                .take_while(|value| value < max)
                .map(|value| value.to_string())
                .collect(),
            Self::Weighted(_) | Self::Real { .. } => return None,
        };
        let mut values: Vec<String> = Vec::new();
        for value in all {
            if !values.contains(&value) {
                values.push(value);
            }
        }
        Some(values)
    }

    /// How many values [`Self::grid`] has at most, without making them.
    pub fn grid_size(&self) -> f64 {
        match self {
            Self::Fixed(_) => 1.0,
            Self::Values(values) => values.len() as f64,
            Self::Integers { min, max } => *max as f64 - *min as f64 + 1.0,
            Self::Real {
                shape: Shape::Uniform { min, max },
                q: Some(q),
            } => ((max - min) / q).ceil(),
            Self::Weighted(_) | Self::Real { .. } => 0.0,
        }
    }

    /// The value at a share `u` in `[0, 1)` of the distribution.
    ///
    /// # Errors
    /// If libtorch cannot compute the quantile of a Gaussian.
    pub fn at(&self, u: f64) -> Result<String, PluginError> {
        Ok(match self {
            Self::Fixed(value) => value.clone(),
            Self::Values(values) => values[index(u, values.len())].clone(),
            Self::Weighted(values) => {
                let mut sum = 0.0;
                let found = values.iter().find(|(_, probability)| {
                    sum += probability;
                    u < sum
                });
                // The sum may be a rounding below 1.
                let last = values.iter().rfind(|(_, probability)| *probability > 0.0);
                found
                    .or(last)
                    .map(|(value, _)| value.clone())
                    .unwrap_or_default()
            }
            Self::Integers { min, max } => {
                let n_values = usize::try_from(max.abs_diff(*min)).unwrap_or(usize::MAX - 1) + 1;
                let offset = i64::try_from(index(u, n_values)).unwrap_or(0);
                (min + offset).to_string()
            }
            Self::Real { shape, q } => {
                let value = shape.at(u)?;
                q.map_or(value, |q| (value / q).round_ties_even() * q)
                    .to_string()
            }
        })
    }
}

impl Shape {
    fn at(self, u: f64) -> Result<f64, PluginError> {
        let gaussian = |mu: f64, sigma: f64| -> Result<f64, PluginError> {
            // The quantile of 0 is -∞.
            let share = Tensor::from(u.max(f64::EPSILON));
            let quantile = share
                .f_special_ndtri()
                .or_plugin_error("the quantile of a Gaussian")?;
            Ok(mu + sigma * quantile.double_value(&[]))
        };
        Ok(match self {
            Self::Uniform { min, max } => min + u * (max - min),
            Self::LogUniform { min, max } => (min + u * (max - min)).exp(),
            Self::Normal { mu, sigma } => gaussian(mu, sigma)?,
            Self::LogNormal { mu, sigma } => gaussian(mu, sigma)?.exp(),
        })
    }
}

/// `⌊u · n⌋`, below `n`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between 0 and `n`"
)]
fn index(u: f64, n: usize) -> usize {
    ((u * n as f64) as usize).min(n.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(values: &[&str]) -> Vec<String> {
        values.iter().map(|&value| value.to_owned()).collect()
    }

    fn real(shape: Shape, q: Option<f64>) -> Domain {
        Domain::Real { shape, q }
    }

    #[test]
    fn a_grid_is_finite_and_has_each_value_once() {
        let uniform = Shape::Uniform { min: 0.0, max: 1.0 };
        for (domain, grid) in [
            (Domain::Fixed("a".into()), Some(&["a"][..])),
            (Domain::Values(texts(&["b", "a", "b"])), Some(&["b", "a"])),
            (
                Domain::Integers { min: -1, max: 2 },
                Some(&["-1", "0", "1", "2"]),
            ),
            (
                real(uniform, Some(0.25)),
                Some(&["0", "0.25", "0.5", "0.75"]),
            ),
            (real(uniform, None), None),
            (Domain::Weighted(vec![("a".into(), 1.0)]), None),
            (
                real(
                    Shape::Normal {
                        mu: 0.0,
                        sigma: 1.0,
                    },
                    Some(1.0),
                ),
                None,
            ),
        ] {
            assert_eq!(domain.grid(), grid.map(texts), "{domain:?}");
        }
    }

    /// Expected values are closed forms; those of Gaussians are table values of Φ⁻¹(0.975) and Φ⁻¹(0.5).
    #[test]
    fn quantiles() {
        const Z: f64 = 1.959_963_984_540_054;
        let at = |domain: &Domain, u: f64| domain.at(u).unwrap();
        let number = |domain: &Domain, u: f64| at(domain, u).parse::<f64>().unwrap();
        let values = Domain::Values(texts(&["a", "b", "c"]));
        assert_eq!([0.0, 0.34, 0.999].map(|u| at(&values, u)), ["a", "b", "c"]);
        let weighted = Domain::Weighted(vec![
            ("a".into(), 0.1),
            ("b".into(), 0.0),
            ("c".into(), 0.9),
        ]);
        assert_eq!(
            [0.0, 0.0999, 0.1, 0.999].map(|u| at(&weighted, u)),
            ["a", "a", "c", "c"]
        );
        let integers = Domain::Integers { min: 3, max: 5 };
        assert_eq!([0.0, 0.5, 0.999].map(|u| at(&integers, u)), ["3", "4", "5"]);
        let uniform = Shape::Uniform { min: 1.0, max: 3.0 };
        assert_eq!(at(&real(uniform, None), 0.25), "1.5");
        assert_eq!(at(&real(uniform, Some(1.0)), 0.25), "2", "half to even");
        let logs = Shape::LogUniform {
            min: 1e-4_f64.ln(),
            max: 1e-2_f64.ln(),
        };
        assert!((number(&real(logs, None), 0.5) - 1e-3).abs() < 1e-12);
        let normal = Shape::Normal {
            mu: 10.0,
            sigma: 2.0,
        };
        assert!((number(&real(normal, None), 0.975) - (10.0 + 2.0 * Z)).abs() < 1e-9);
        assert_eq!(at(&real(normal, Some(4.0)), 0.975), "12");
        let log_normal = Shape::LogNormal {
            mu: 1.0,
            sigma: 0.5,
        };
        assert!((number(&real(log_normal, None), 0.5) - 1_f64.exp()).abs() < 1e-9);
        assert!(number(&real(normal, None), 0.0).is_finite());
    }

    #[test]
    fn sizes_are_those_of_the_grids() {
        for domain in [
            Domain::Fixed("a".into()),
            Domain::Values(texts(&["a", "b"])),
            Domain::Integers { min: -5, max: 5 },
            real(Shape::Uniform { min: 0.0, max: 1.0 }, Some(0.3)),
        ] {
            assert!(
                (domain.grid_size() - domain.grid().unwrap().len() as f64).abs() < 0.5,
                "{domain:?}"
            );
        }
    }
}
