//! A curve of bounded size, made from any number of rows.
//!
//! ```text
//! rows      n rows in order, in buckets of k rows each; k doubles whenever there would be more than `N_BUCKETS` buckets
//! bucket    its lowest and its highest point, at their own steps; a mark if a value in it was no number
//! ```
//! So that no peak is lost, and a curve of few rows is drawn as it is.

use serde::Serialize;

/// Buckets of a curve; a page shows fewer pixels.
const N_BUCKETS: usize = 512;

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
    range: Option<(Point, Point)>,
    /// Step of the first value that is no number.
    hole: Option<u64>,
}

/// What the page draws: `null` is a gap.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Points {
    #[serde(rename = "s")]
    pub(super) steps: Vec<u64>,
    #[serde(rename = "v")]
    pub(super) values: Vec<Option<Short>>,
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
        let mut row = Bucket {
            n_rows: 1,
            range: None,
            hole: None,
        };
        if value.is_finite() {
            let point = Point { step, value };
            row.range = Some((point, point));
            self.last = Some(point);
            self.range = wider(self.range, row.range);
        } else {
            self.n_not_finite += 1;
            row.hole = Some(step);
        }
        match self.buckets.last_mut() {
            Some(last) if last.n_rows < self.rows_per_bucket => *last = last.with(row),
            _ => {
                if self.buckets.len() >= N_BUCKETS {
                    halve(&mut self.buckets);
                    self.rows_per_bucket *= 2;
                }
                self.rows_per_bucket = self.rows_per_bucket.max(1);
                self.buckets.push(row);
            }
        }
    }

    /// Whether every finite value is among the points of at most `n_buckets`.
    pub(super) fn is_whole(&self, n_buckets: usize) -> bool {
        self.rows_per_bucket <= 1 && self.buckets.len() <= n_buckets
    }

    /// The points, from at most `n_buckets` buckets, by step.
    pub(super) fn points(&self, n_buckets: usize) -> Points {
        let mut buckets = self.buckets.clone();
        while buckets.len() > n_buckets.max(1) {
            halve(&mut buckets);
        }
        let mut points: Vec<(u64, Option<Short>)> = Vec::new();
        for bucket in buckets {
            points.extend(bucket.hole.map(|step| (step, None)));
            if let Some((low, high)) = bucket.range {
                let as_drawn = |point: Point| (point.step, Some(Short(point.value)));
                points.push(as_drawn(low));
                points.extend((high.step != low.step).then(|| as_drawn(high)));
            }
        }
        points.sort_by_key(|(step, _)| *step);
        let (steps, values) = points.into_iter().unzip();
        Points { steps, values }
    }
}

impl Bucket {
    fn with(self, later: Self) -> Self {
        Self {
            n_rows: self.n_rows + later.n_rows,
            range: wider(self.range, later.range),
            hole: self.hole.or(later.hole),
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

/// The lowest and the highest point of both.
fn wider(a: Option<(Point, Point)>, b: Option<(Point, Point)>) -> Option<(Point, Point)> {
    let (Some(a), Some(b)) = (a, b) else {
        return a.or(b);
    };
    let low = if b.0.value < a.0.value { b.0 } else { a.0 };
    let high = if b.1.value > a.1.value { b.1 } else { a.1 };
    Some((low, high))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_curve_is_drawn_as_it_is() {
        let mut curve = Curve::default();
        for (step, value) in [
            (1, 3.0),
            (2, f64::NAN),
            (5, 2.5),
            (9, f64::INFINITY),
            (10, 4.0),
        ] {
            curve.push(step, value);
        }
        assert_eq!(curve.points(N_BUCKETS).steps, [1, 2, 5, 9, 10]);
        let text = serde_json::to_string(&curve.points(N_BUCKETS)).unwrap();
        assert_eq!(text, r#"{"s":[1,2,5,9,10],"v":[3.0,null,2.5,null,4.0]}"#);
        assert_eq!((curve.n_rows, curve.n_not_finite), (5, 2));
        assert_eq!(curve.last.unwrap().value, 4.0);
        let (low, high) = curve.range.unwrap();
        assert_eq!((low.step, high.step), (5, 10));
        assert!(curve.is_whole(N_BUCKETS));
    }

    #[test]
    fn a_long_curve_keeps_its_peaks_and_its_holes() {
        let mut curve = Curve::default();
        let value = |step: u64| match step {
            31_415 => 1e6,
            27_182 => -1e6,
            50_000 => f64::NAN,
            step => (step as f64 / 500.0).sin(),
        };
        for step in 0..100_000 {
            curve.push(step, value(step));
        }
        assert!(!curve.is_whole(N_BUCKETS));
        for n_buckets in [N_BUCKETS, 64, 1] {
            let points = curve.points(n_buckets);
            assert!(
                points.steps.len() <= 2 * n_buckets + 1,
                "{}",
                points.steps.len()
            );
            assert!(points.steps.is_sorted());
            let at = |step| points.values[points.steps.binary_search(&step).unwrap()];
            assert_eq!(at(31_415), Some(Short(1e6)));
            assert_eq!(at(27_182), Some(Short(-1e6)));
            assert_eq!(at(50_000), None);
            for (step, shown) in points.steps.iter().zip(&points.values) {
                assert!(shown.is_none_or(|shown| shown.0 == value(*step)), "{step}");
            }
        }
    }

    #[test]
    fn numbers_have_few_digits_and_keep_their_size() {
        let text = |value: f64| serde_json::to_string(&Short(value)).unwrap();
        assert_eq!(text(1.0 / 3.0), "0.33333334");
        assert_eq!(text(1e300), "1e300");
        assert_eq!(text(1e-300), "1e-300");
        assert_eq!(text(0.0), "0.0");
    }
}
