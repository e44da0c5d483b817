//! Charts from what their producers have.

use crate::plot::{
    Axis, Bars, Clustermap, Confusion, Frames, Heatmap, Histogram, Image, Matrix, Plot, Scale,
    Series, Table, XyChart,
};

/// Bins of a histogram, as in the reference.
const N_BINS: usize = 64;

impl Histogram {
    /// 64 bins of the same width from the smallest to the largest value. NaN and infinities are left out.
    pub fn linear(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values
            .into_iter()
            .filter(|value| value.is_finite())
            .collect();
        let (low, high) = range(&values);
        // All values are the same: bins around them.
        let (low, high) = if low < high {
            (low, high)
        } else {
            (low - 0.5, high + 0.5)
        };
        let edge = |index: usize| {
            let share = index as f64 / N_BINS as f64;
            // Not `low + share * (high - low)`, which may be infinite.
            low * (1.0 - share) + high * share
        };
        Self::count(&values, (0..=N_BINS).map(edge).collect())
    }

    /// Bins from each power of two to the next, at most 64: smaller values than `largest / 2⁶⁴` are in the first. What
    /// is not positive, NaN and infinities are left out.
    pub fn log2(values: impl IntoIterator<Item = f64>) -> Self {
        let is_shown = |value: &f64| value.is_finite() && *value > 0.0;
        let values: Vec<f64> = values.into_iter().filter(is_shown).collect();
        if values.is_empty() {
            return Self::count(&values, vec![1.0, 2.0]);
        }
        let (low, high) = range(&values);
        let (first, last) = (low.log2().floor(), high.log2().floor() + 1.0);
        let first = first.max(last - N_BINS as f64);
        let edges = std::iter::successors(Some(first), |&power| Some(power + 1.0));
        let edges = edges.take_while(|&power| power <= last);
        Self::count(&values, edges.map(f64::exp2).collect())
    }

    fn count(values: &[f64], edges: Vec<f64>) -> Self {
        let n_bins = edges.len() - 1;
        let mut counts = vec![0; n_bins];
        for value in values {
            let bin = edges
                .partition_point(|edge| edge <= value)
                .saturating_sub(1);
            counts[bin.min(n_bins - 1)] += 1;
        }
        Self {
            edges,
            counts,
            sum: values.iter().sum(),
            sum_squares: values.iter().map(|value| value * value).sum(),
            range: range(values),
        }
    }

    /// Whether the bins are those of [`Self::log2`].
    pub fn is_log(&self) -> bool {
        self.edges.len() > 1
            && self.edges[0] > 0.0
            && self
                .edges
                .windows(2)
                .all(|edges| (edges[1] / edges[0] - 2.0).abs() < 1e-9)
    }
}

/// Smallest and largest value; zeros if there is none.
fn range(values: &[f64]) -> (f64, f64) {
    let bounds = values.iter().copied().map(|value| (value, value));
    let bounds = bounds.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
    bounds.unwrap_or_default()
}

impl Axis {
    /// A linear axis.
    pub fn new(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            ..Self::default()
        }
    }

    /// With names at the places 0, 1, ….
    #[must_use]
    pub fn with_names(mut self, names: Vec<String>) -> Self {
        self.names = names;
        self
    }

    /// On which equal steps multiply.
    #[must_use]
    pub fn log(mut self) -> Self {
        self.scale = Scale::Log;
        self
    }
}

impl Series {
    /// Values at the places 0, 1, ….
    pub fn new(name: impl Into<String>, y: Vec<f64>) -> Self {
        Self {
            name: name.into(),
            y,
            ..Self::default()
        }
    }

    /// At places of their own; `x` is as long as the values.
    #[must_use]
    pub fn at(mut self, x: Vec<f64>) -> Self {
        self.x = x;
        self
    }

    /// With error bars of one standard deviation to both sides; `std` is as long as the values.
    #[must_use]
    pub fn with_std(mut self, std: &[f64]) -> Self {
        self.error = std.iter().map(|&std| (std, std)).collect();
        self
    }

    /// With error bars from the smallest to the largest; `range` is as long as the values.
    #[must_use]
    pub fn with_range(mut self, range: &[(f64, f64)]) -> Self {
        let lengths = self
            .y
            .iter()
            .zip(range)
            .map(|(y, (low, high))| (y - low, high - y));
        self.error = lengths.collect();
        self
    }
}

impl Matrix {
    /// Rows of the same length, one after the other.
    ///
    /// # Panics
    /// If `values` are no whole number of rows of `n_cols`, which is a bug in the caller.
    pub fn new(n_cols: usize, values: Vec<f32>) -> Self {
        let n_rows = values.len().checked_div(n_cols).unwrap_or(0);
        assert_eq!(n_rows * n_cols, values.len(), "rows of {n_cols} numbers");
        Self {
            n_rows,
            n_cols,
            values,
        }
    }
}

impl Confusion {
    /// Counts pairs of true and predicted class, each below `names.len()`; others are left out. The reference counts
    /// by predicted class and transposes.
    pub fn count(names: Vec<String>, pairs: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let n = names.len();
        let mut counts = vec![0.0; n * n];
        for (truth, predicted) in pairs {
            if truth < n && predicted < n {
                counts[truth * n + predicted] += 1.0;
            }
        }
        Self {
            counts: Matrix::new(n, counts),
            names,
        }
    }
}

macro_rules! into_plot {
    ($($kind:ident($data:ty)),* $(,)?) => {$(
        impl From<$data> for Plot {
            fn from(data: $data) -> Self {
                Self::$kind(data)
            }
        }
    )*};
}

into_plot!(
    Table(Table),
    Histogram(Histogram),
    Images(Vec<Image>),
    Bars(Bars),
    Xy(XyChart),
    Heatmap(Heatmap),
    Confusion(Confusion),
    Clustermap(Clustermap),
    Frames(Frames),
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_bins_are_64_and_take_every_finite_value() {
        let values = (0..=1000).map(f64::from).chain([f64::NAN, f64::INFINITY]);
        let histogram = Histogram::linear(values);
        assert_eq!((histogram.edges.len(), histogram.counts.len()), (65, 64));
        assert_eq!(histogram.counts.iter().sum::<u64>(), 1001);
        assert!(
            histogram
                .counts
                .iter()
                .all(|&count| (15..=17).contains(&count))
        );
        assert_eq!(histogram.range, (0.0, 1000.0));
        assert!((histogram.sum - 500_500.0).abs() < 1e-9);
        assert!(!histogram.is_log());
    }

    #[test]
    fn equal_and_extreme_values_have_bins() {
        assert_eq!(Histogram::linear([3.0; 5]).counts.iter().sum::<u64>(), 5);
        let histogram = Histogram::linear([f64::MIN, f64::MAX]);
        assert!(histogram.edges.iter().all(|edge| edge.is_finite()));
        assert_eq!((histogram.counts[0], histogram.counts[63]), (1, 1));
        assert_eq!(Histogram::linear([]).counts.iter().sum::<u64>(), 0);
    }

    #[test]
    fn logarithmic_bins_are_powers_of_two() {
        let histogram = Histogram::log2([1.0, 2.0, 3.0, 4.0, 9.0, 0.0, -1.0, f64::NAN]);
        assert_eq!(histogram.edges, [1.0, 2.0, 4.0, 8.0, 16.0]);
        assert_eq!(histogram.counts, [1, 2, 1, 1]);
        assert!(histogram.is_log());
        let wide = Histogram::log2([1e-300, 1.0]);
        assert_eq!(
            (wide.counts.len(), wide.counts[0], wide.counts[63]),
            (64, 1, 1)
        );
        assert_eq!(Histogram::log2([0.0]).counts, [0]);
    }

    #[test]
    fn error_bars_of_a_range_are_its_distances() {
        let series = Series::new("k", vec![2.0, 5.0]).with_range(&[(1.0, 4.0), (5.0, 6.0)]);
        assert_eq!(series.error, [(1.0, 2.0), (0.0, 1.0)]);
    }

    #[test]
    fn confusions_are_counted_by_true_class() {
        let names = vec!["a".to_owned(), "b".to_owned()];
        let confusion = Confusion::count(names, [(0, 1), (0, 1), (1, 1), (2, 0)]);
        assert_eq!(confusion.counts.values, [0.0, 2.0, 0.0, 1.0]);
    }
}
