//! A curve of bounded size, made from any number of rows.
//!
//! ```text
//! rows      n rows in order, in buckets of k rows each; k doubles whenever there would be more than `N_BUCKETS` buckets
//! bucket    mean, lowest and highest value of its rows; a mark if one of them is no number
//! ```
//! So that no peak is lost, and a curve of few rows is drawn as it is.

use serde::Serialize;

/// Buckets of a curve; a page shows fewer pixels.
pub(super) const N_BUCKETS: usize = 512;

/// A value of a metric.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Point {
    pub(super) step: u64,
    pub(super) value: f64,
}

/// A metric of one run.
#[derive(Debug, Default)]
pub(super) struct Curve {
    buckets: Vec<Bucket>,
    rows_per_bucket: u64,
    /// Rows with this metric.
    pub(super) n_rows: u64,
    /// Those of them whose value is NaN or infinite.
    pub(super) n_not_finite: u64,
    /// The newest finite value.
    pub(super) last: Option<Point>,
    /// The lowest and the highest one, the first of equal ones.
    pub(super) range: Option<(Point, Point)>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    n_rows: u64,
    /// Steps of the first and of the last row.
    steps: (u64, u64),
    /// Finite values: how many, their sum, the lowest and the highest.
    n_finite: u64,
    sum: f64,
    range: (f64, f64),
}

/// What the page draws: `null` is a gap.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(super) struct Points {
    #[serde(rename = "s")]
    pub(super) steps: Vec<u64>,
    /// Values, or means of buckets.
    #[serde(rename = "v")]
    pub(super) values: Vec<Option<Short>>,
    /// Of buckets only: the lowest and the highest values.
    #[serde(rename = "l", skip_serializing_if = "Vec::is_empty")]
    pub(super) lows: Vec<Option<Short>>,
    #[serde(rename = "h", skip_serializing_if = "Vec::is_empty")]
    pub(super) highs: Vec<Option<Short>>,
}

/// A number with the digits of an f32, which is more than a screen shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Short(pub(super) f64);

impl Serialize for Short {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[expect(clippy::cast_possible_truncation, reason = "digits are cut on purpose")]
        let short = self.0 as f32;
        // Beyond an f32's range it would become 0 or infinite.
        if short.is_normal() || self.0 == 0.0 {
            serializer.serialize_f32(short)
        } else {
            serializer.serialize_f64(self.0)
        }
    }
}

impl Curve {
    /// Adds a row's value.
    pub(super) fn push(&mut self, step: u64, value: f64) {
        self.n_rows += 1;
        if value.is_finite() {
            let point = Point { step, value };
            self.last = Some(point);
            let (low, high) = self.range.get_or_insert((point, point));
            if value < low.value {
                *low = point;
            }
            if value > high.value {
                *high = point;
            }
        } else {
            self.n_not_finite += 1;
        }
        let row = Bucket::of(step, value);
        match self.buckets.last_mut() {
            Some(last) if last.n_rows < self.rows_per_bucket => *last = last.with(row),
            _ => {
                self.rows_per_bucket = self.rows_per_bucket.max(1);
                if self.buckets.len() >= N_BUCKETS {
                    halve(&mut self.buckets);
                    self.rows_per_bucket *= 2;
                }
                self.buckets.push(row);
            }
        }
    }

    /// Whether every value is among the points of at most `n_buckets`.
    pub(super) fn is_whole(&self, n_buckets: usize) -> bool {
        self.rows_per_bucket <= 1 && self.buckets.len() <= n_buckets
    }

    /// Buckets, if at most `n_buckets` are wanted.
    pub(super) fn n_points(&self, n_buckets: usize) -> usize {
        self.buckets.len().min(n_buckets)
    }

    /// The points, from at most `n_buckets` buckets.
    pub(super) fn points(&self, n_buckets: usize) -> Points {
        let mut buckets = self.buckets.clone();
        while buckets.len() > n_buckets.max(1) {
            halve(&mut buckets);
        }
        let is_whole = self.is_whole(n_buckets);
        let mut points = Points::default();
        for bucket in &buckets {
            let (first, last) = bucket.steps;
            let known = |value: f64| (bucket.n_finite > 0).then_some(Short(value));
            points.steps.push(first.midpoint(last));
            points
                .values
                .push(known(bucket.sum / bucket.n_finite as f64));
            if !is_whole {
                points.lows.push(known(bucket.range.0));
                points.highs.push(known(bucket.range.1));
                if bucket.n_finite > 0 && bucket.n_finite < bucket.n_rows {
                    points.steps.push(last);
                    points.values.push(None);
                    points.lows.push(None);
                    points.highs.push(None);
                }
            }
        }
        points
    }
}

impl Bucket {
    fn of(step: u64, value: f64) -> Self {
        let is_finite = value.is_finite();
        Self {
            n_rows: 1,
            steps: (step, step),
            n_finite: u64::from(is_finite),
            sum: if is_finite { value } else { 0.0 },
            range: if is_finite {
                (value, value)
            } else {
                (f64::INFINITY, f64::NEG_INFINITY)
            },
        }
    }

    fn with(self, later: Self) -> Self {
        Self {
            n_rows: self.n_rows + later.n_rows,
            steps: (self.steps.0, later.steps.1),
            n_finite: self.n_finite + later.n_finite,
            sum: self.sum + later.sum,
            range: (
                self.range.0.min(later.range.0),
                self.range.1.max(later.range.1),
            ),
        }
    }
}

/// Joins neighbours.
fn halve(buckets: &mut Vec<Bucket>) {
    let joined = buckets.chunks(2).map(|pair| match *pair {
        [first, second] => first.with(second),
        _ => pair[0],
    });
    *buckets = joined.collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_curve_is_drawn_as_it_is() {
        let mut curve = Curve::default();
        let rows = [
            (1, 3.0),
            (2, f64::NAN),
            (5, 2.5),
            (9, f64::INFINITY),
            (10, 4.0),
        ];
        for (step, value) in rows {
            curve.push(step, value);
        }
        let text = serde_json::to_string(&curve.points(N_BUCKETS)).unwrap();
        assert_eq!(text, r#"{"s":[1,2,5,9,10],"v":[3.0,null,2.5,null,4.0]}"#);
        assert_eq!((curve.n_rows, curve.n_not_finite), (5, 2));
        assert_eq!(
            curve.last,
            Some(Point {
                step: 10,
                value: 4.0
            })
        );
        let (low, high) = curve.range.unwrap();
        assert_eq!((low.step, high.step), (5, 10));
        assert!(curve.is_whole(N_BUCKETS) && !curve.is_whole(4));
    }

    #[test]
    fn a_long_curve_keeps_its_peaks_its_holes_and_its_mean() {
        let mut curve = Curve::default();
        let value = |step: u64| match step {
            31_415 => 1e6,
            27_182 => -1e6,
            50_000 => f64::NAN,
            step => step as f64,
        };
        for step in 0..100_000 {
            curve.push(step, value(step));
        }
        assert!(!curve.is_whole(N_BUCKETS));
        for n_buckets in [N_BUCKETS, 64, 1] {
            let points = curve.points(n_buckets);
            let n_points = points.steps.len();
            assert!(n_points <= n_buckets + 1, "{n_points}");
            assert!(points.steps.is_sorted());
            assert_eq!(points.highs.len(), n_points);
            assert_eq!(
                points.lows.iter().flatten().count(),
                n_points - 1,
                "one hole"
            );
            let at = |peak: f64, of: &[Option<Short>]| {
                let index = of.iter().position(|value| *value == Some(Short(peak)));
                points.steps[index.unwrap()]
            };
            let width = 100_000 / curve.n_points(n_buckets) as u64 * 2;
            assert!(at(1e6, &points.highs).abs_diff(31_415) <= width);
            assert!(at(-1e6, &points.lows).abs_diff(27_182) <= width);
            // Far from the peaks the mean of a bucket is the value of its middle.
            let middle = |index: &usize| n_points > 1 && points.steps[*index] > 60_000;
            for index in (0..n_points).filter(middle) {
                let Some(Short(mean)) = points.values[index] else {
                    continue; // the hole, whose place is the end of its bucket
                };
                assert!((mean - points.steps[index] as f64).abs() <= 0.5, "{mean}");
            }
        }
    }

    #[test]
    fn numbers_have_few_digits_and_keep_their_size() {
        let read = |value: f64| {
            let text = serde_json::to_string(&Short(value)).unwrap();
            (text.len(), text.parse::<f64>().unwrap())
        };
        let (length, third) = read(1.0 / 3.0);
        assert!(length <= 10 && (third - 1.0 / 3.0).abs() < 1e-7);
        for value in [1e300, 1e-300, 0.0] {
            assert_eq!(read(value).1.to_bits(), value.to_bits());
        }
    }
}
