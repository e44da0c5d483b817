//! Where an axis begins and ends, and which of its places carry a number.

use crate::plot::{Axis, Scale};

/// Larger numbers are as good as infinite, and smaller ones as zero: their differences and ratios must be numbers.
const LARGEST: f64 = 1e300;
const SMALLEST: f64 = 1e-300;

/// What an axis shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Span {
    scale: Scale,
    /// Below `high`, both finite; positive on a logarithmic axis.
    low: f64,
    high: f64,
}

/// A mark on an axis.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tick {
    /// In `0..=1` along the axis.
    pub(crate) at: f64,
    /// Empty for a small mark between two numbers.
    pub(crate) label: String,
}

impl Span {
    /// The axis' limits, or else the range of `values` with `margin` of it on both sides; never empty.
    pub(crate) fn of(axis: &Axis, values: impl Iterator<Item = f64>, margin: f64) -> Self {
        Self::new(axis.scale, axis.limits, values, margin)
    }

    pub(crate) fn new(
        scale: Scale,
        limits: Option<(f64, f64)>,
        values: impl Iterator<Item = f64>,
        margin: f64,
    ) -> Self {
        let is_shown =
            |value: &f64| value.abs() <= LARGEST && (scale == Scale::Linear || *value >= SMALLEST);
        let limits = limits
            .filter(|(low, high)| is_shown(low) && is_shown(high))
            .map(|(low, high)| (low.min(high), low.max(high)));
        let margin = if limits.is_some() { 0.0 } else { margin };
        let (low, high) = limits.unwrap_or_else(|| {
            values
                .filter(is_shown)
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                    (low.min(value), high.max(value))
                })
        });
        let span = |low, high| Self { scale, low, high };
        match scale {
            _ if low > high => span(1.0, 10.0).without_data(),
            Scale::Linear => {
                let room = (high - low) * margin;
                if high - low > low.abs().max(high.abs()) * 1e-9 && high - low > SMALLEST {
                    span(low - room, high + room)
                } else {
                    let room = if low == 0.0 {
                        1.0
                    } else {
                        (low.abs() / 2.0).max(SMALLEST)
                    };
                    span(low - room, high + room)
                }
            }
            Scale::Log => {
                let room = if high / low > 1.0 + 1e-9 {
                    (high / low).powf(margin)
                } else {
                    2.0
                };
                span(
                    (low / room).max(SMALLEST / 2.0),
                    (high * room).min(2.0 * LARGEST),
                )
            }
        }
    }

    fn without_data(self) -> Self {
        match self.scale {
            Scale::Linear => Self {
                low: 0.0,
                high: 1.0,
                ..self
            },
            Scale::Log => self,
        }
    }

    /// The same with zero, from which bars grow.
    pub(crate) fn with_zero(self) -> Self {
        match self.scale {
            Scale::Linear => Self {
                low: self.low.min(0.0),
                high: self.high.max(0.0),
                ..self
            },
            Scale::Log => self,
        }
    }

    /// How far along the axis a value is: 0 at its beginning, 1 at its end. None for what the axis has no place for.
    pub(crate) fn place(&self, value: f64) -> Option<f64> {
        if value.abs() > LARGEST || value.is_nan() {
            return None;
        }
        match self.scale {
            Scale::Linear => Some((value - self.low) / (self.high - self.low)),
            Scale::Log if value >= SMALLEST => {
                // Differences of logarithms: the ratio of the ends may be no number.
                let (low, high) = (self.low.ln(), self.high.ln());
                Some((value.ln() - low) / (high - low))
            }
            Scale::Log => None,
        }
    }

    /// About `n` round numbers, and small marks between powers of ten.
    pub(crate) fn ticks(&self, n: usize) -> Vec<Tick> {
        let decades = self.high.log10() - self.low.log10();
        let ticks = match self.scale {
            Scale::Log if decades >= 2.0 => self.powers(n),
            Scale::Log if decades >= 1.0 => self.ones_twos_fives(),
            _ => self.steps(n),
        };
        let is_inside = |tick: &Tick| (-1e-9..=1.0 + 1e-9).contains(&tick.at);
        ticks.into_iter().filter(is_inside).collect()
    }

    fn tick(&self, value: f64, label: String) -> Option<Tick> {
        let at = self.place(value)?;
        Some(Tick { at, label })
    }

    /// Steps of 1, 2 or 5 times a power of ten.
    fn steps(&self, n: usize) -> Vec<Tick> {
        let rough = (self.high - self.low) / n.max(1) as f64;
        let power = 10f64.powf(rough.log10().floor());
        let factor = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .find(|f| f * power >= rough * 0.999);
        let step = factor.unwrap_or(10.0) * power;
        let first = (self.low / step).ceil();
        (0..=2 * n)
            .filter_map(|index| {
                let value = (first + index as f64) * step;
                // Not `-0`, nor the rest of a subtraction.
                let value = if value.abs() < step / 1e3 { 0.0 } else { value };
                self.tick(
                    value,
                    number(value, step, self.low.abs().max(self.high.abs())),
                )
            })
            .collect()
    }

    fn powers(&self, n: usize) -> Vec<Tick> {
        let (first, last) = (exponent(self.low), exponent(self.high));
        let n_powers = usize::try_from(last - first).unwrap_or_default() + 1;
        let every = i32::try_from(n_powers.div_ceil(n.max(1))).unwrap_or(1);
        let mut ticks = Vec::new();
        for power in first..=last {
            let value = 10f64.powi(power);
            let is_named = power.rem_euclid(every) == 0;
            let label = if is_named {
                format!("10{}", superscript(power))
            } else {
                String::new()
            };
            ticks.extend(self.tick(value, label));
            if n_powers <= 6 {
                let between =
                    (2..10).filter_map(|digit| self.tick(value * f64::from(digit), String::new()));
                ticks.extend(between);
            }
        }
        ticks
    }

    fn ones_twos_fives(&self) -> Vec<Tick> {
        let powers = exponent(self.low)..=exponent(self.high);
        powers
            .flat_map(|power| {
                [1.0, 2.0, 5.0].map(|digit| (digit * 10f64.powi(power), 10f64.powi(power)))
            })
            .filter_map(|(value, power)| self.tick(value, number(value, power, value)))
            .collect()
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "an exponent of ten has three digits"
)]
fn exponent(value: f64) -> i32 {
    value.log10().floor() as i32
}

fn superscript(number: i32) -> String {
    number
        .to_string()
        .chars()
        .map(|c| match c {
            '-' => '⁻',
            '1' => '¹',
            '2' => '²',
            '3' => '³',
            digit => digit
                .to_digit(10)
                .and_then(|digit| char::from_u32(0x2070 + digit))
                .unwrap_or(digit),
        })
        .collect()
}

/// `value` with the digits that tell it from its neighbours at a distance of `step`; with an exponent if the largest
/// number of the axis is so large or the step so small that zeros would hide the digits.
pub(crate) fn number(value: f64, step: f64, largest: f64) -> String {
    let (step, largest) = (exponent(step.abs()), exponent(largest.abs()));
    if (-4..0).contains(&step) && largest < 6 {
        let digits = usize::try_from(-step).unwrap_or_default();
        format!("{value:.digits$}")
    } else if (0..6).contains(&step) && largest < 6 {
        format!("{value:.0}")
    } else if value == 0.0 {
        "0".to_owned()
    } else {
        let digits = usize::try_from(exponent(value.abs()) - step).unwrap_or_default();
        let text = format!("{value:.*e}", digits.min(6));
        match text.split_once('e') {
            Some((digits, power)) if digits.contains('.') => {
                let digits = digits.trim_end_matches('0').trim_end_matches('.');
                format!("{digits}e{power}")
            }
            _ => text,
        }
    }
}

/// The smallest round number of places that lie at least `n` apart: 1, 2, 5, 10, 20, ….
pub(crate) fn every(n: f32) -> usize {
    let mut power = 1;
    loop {
        for factor in [1, 2, 5] {
            let every = factor * power;
            if every as f32 >= n || every >= 5_000_000 {
                return every;
            }
        }
        power *= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: Scale, low: f64, high: f64) -> Vec<String> {
        let span = Span::new(scale, Some((low, high)), std::iter::empty(), 0.0);
        let ticks = span.ticks(5).into_iter().map(|tick| tick.label);
        ticks.filter(|label| !label.is_empty()).collect()
    }

    #[test]
    fn numbers_are_round_and_as_long_as_they_must_be() {
        let linear = |low, high| labels(Scale::Linear, low, high).join(" ");
        assert_eq!(linear(0.0, 1.0), "0.0 0.2 0.4 0.6 0.8 1.0");
        assert_eq!(linear(-1.0, 1.0), "-1.0 -0.5 0.0 0.5 1.0");
        assert_eq!(
            linear(0.0, 250_000.0),
            "0 50000 100000 150000 200000 250000"
        );
        assert_eq!(linear(0.0, 4e9), "0 1e9 2e9 3e9 4e9");
        assert_eq!(linear(0.0, 2.5e-7), "0 5e-8 1e-7 1.5e-7 2e-7 2.5e-7");
        assert_eq!(linear(7.25, 7.29), "7.25 7.26 7.27 7.28 7.29");
    }

    #[test]
    fn logarithmic_axes_count_in_powers_or_in_ones_twos_and_fives() {
        let log = |low, high| labels(Scale::Log, low, high).join(" ");
        assert_eq!(log(1e-3, 10.0), "10⁻³ 10⁻² 10⁻¹ 10⁰ 10¹");
        assert_eq!(log(8.0, 90.0), "10 20 50");
        assert_eq!(log(8.0, 45.0), "10 20 30 40");
        assert_eq!(log(1e-12, 1e12), "10⁻¹⁰ 10⁻⁵ 10⁰ 10⁵ 10¹⁰");
        assert_eq!(log(20.0, 30.0), "20 22 24 26 28 30");
    }

    #[test]
    fn there_is_always_something_between_the_ends() {
        let axis = |scale| Axis {
            scale,
            ..Axis::default()
        };
        for scale in [Scale::Linear, Scale::Log] {
            for values in [
                vec![],
                vec![f64::NAN, f64::INFINITY],
                vec![0.0],
                vec![-3.0, -3.0],
                vec![5e-324],
                vec![1e308, -1e308],
                vec![1e300, -1e300],
                vec![1e9, 1e9 + 1e-7],
            ] {
                let span = Span::of(&axis(scale), values.iter().copied(), 0.05);
                assert!(span.low < span.high, "{scale:?} {values:?} {span:?}");
                assert!((span.low.is_finite() && span.high.is_finite()), "{span:?}");
                assert!(span.ticks(6).len() < 100);
            }
        }
    }

    #[test]
    fn what_an_axis_cannot_show_has_no_place() {
        let log = Span::new(Scale::Log, Some((1.0, 100.0)), std::iter::empty(), 0.0);
        assert!((log.place(10.0).unwrap() - 0.5).abs() < 1e-12);
        for value in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(log.place(value), None);
        }
    }

    #[test]
    fn labels_are_left_out_evenly() {
        assert_eq!(
            [0.3, 1.0, 1.5, 3.0, 7.0, 11.0].map(every),
            [1, 1, 2, 5, 10, 20]
        );
    }
}
