//! From a model's charts to plots: numbers that have arrived, and names for the places on their axes.

use super::labels::Labels;
use moeut_plot::{Axis, Bars, Frames, Heatmap, Matrix, Plot, Series};
use moeut_plugin_api::{AxisPart, ChartAxis, ChartKind, PluginError};

/// A chart whose numbers are on their way.
#[derive(Debug)]
pub struct Sketch {
    /// In the logs.
    pub name: String,
    /// What it will be.
    pub kind: ChartKind,
    /// Shape of its numbers.
    pub size: Vec<i64>,
}

/// What a chart is in a record.
#[derive(Debug, PartialEq)]
pub(super) enum Shown {
    /// A scalar.
    Number(f64),
    /// A plot.
    Plot(Box<Plot>),
}

impl Sketch {
    /// Whether the names of its places are tokens.
    pub(super) fn has_tokens(&self) -> bool {
        let is_token = |part: &AxisPart| !matches!(part, AxisPart::Names(_));
        match &self.kind {
            ChartKind::Number => false,
            ChartKind::Bars { x, y }
            | ChartKind::Heatmap { x, y, .. }
            | ChartKind::Frames { x, y, .. } => x.parts.iter().chain(&y.parts).any(is_token),
        }
    }

    /// Draws it; `labels` are the tokens of its pass, where it shows any.
    ///
    /// # Errors
    /// If the shape of the numbers is not one of its kind.
    pub(super) fn draw(
        self,
        values: &[f64],
        labels: Option<&Labels>,
    ) -> Result<(String, Shown), PluginError> {
        let size: Vec<usize> = self
            .size
            .iter()
            .map(|&size| usize::try_from(size).unwrap_or(0))
            .collect();
        let axis = |axis: ChartAxis| named(axis, labels);
        let shown = match (self.kind, &size[..], values) {
            (ChartKind::Number, _, [value]) => Shown::Number(*value),
            (ChartKind::Bars { x, y }, &([n] | [3, n]), _) => {
                let (heights, errors) = values.split_at(n);
                let (below, above) = errors.split_at(errors.len() / 2);
                Shown::Plot(Box::new(Plot::Bars(Bars {
                    x: axis(x),
                    y: axis(y),
                    series: vec![Series {
                        y: heights.to_vec(),
                        error: below.iter().copied().zip(above.iter().copied()).collect(),
                        ..Series::default()
                    }],
                    shows_values: false,
                })))
            }
            (ChartKind::Heatmap { x, y, range }, &[n_rows, n_cols], _) => {
                Shown::Plot(Box::new(Plot::Heatmap(Heatmap {
                    matrix: matrix(n_rows, n_cols, values),
                    x: axis(x),
                    y: axis(y),
                    range,
                    ..Heatmap::default()
                })))
            }
            (
                ChartKind::Frames {
                    x,
                    y,
                    range,
                    titles,
                },
                &[n, n_rows, n_cols],
                _,
            ) if n == titles.len() => {
                let cells = (n_rows * n_cols).max(1);
                let frames = titles.into_iter().zip(values.chunks(cells));
                Shown::Plot(Box::new(Plot::Frames(Frames {
                    frames: frames
                        .map(|(title, values)| (title, matrix(n_rows, n_cols, values)))
                        .collect(),
                    x: axis(x),
                    y: axis(y),
                    range,
                })))
            }
            (kind, size, _) => {
                return Err(PluginError::new("the model's plugin sent a chart that is none")
                    .why(format!("the numbers of `{}` have the shape {size:?}, and it is {kind:?}", self.name))
                    .fix("report this to the authors of the plugin; `-details_log_interval none -debug_plot_interval none` turns charts off"));
            }
        };
        Ok((self.name, shown))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "colours have fewer steps than float32"
)]
fn matrix(n_rows: usize, n_cols: usize, values: &[f64]) -> Matrix {
    Matrix {
        n_rows,
        n_cols,
        values: values.iter().map(|&value| value as f32).collect(),
    }
}

fn named(axis: ChartAxis, labels: Option<&Labels>) -> Axis {
    let names = axis.parts.into_iter().flat_map(|part| match part {
        AxisPart::Names(names) => names,
        AxisPart::Inputs(range) => Labels::of(labels.map(|labels| &labels.inputs[..]), range),
        AxisPart::Targets(range) => Labels::of(labels.map(|labels| &labels.targets[..]), range),
    });
    Axis {
        label: axis.label,
        names: names.collect(),
        ..Axis::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moeut_plugin_api::TokenRange;

    fn sketch(kind: ChartKind, size: &[i64]) -> Sketch {
        Sketch {
            name: "a".to_owned(),
            kind,
            size: size.to_vec(),
        }
    }

    fn bars() -> ChartKind {
        ChartKind::Bars {
            x: ChartAxis::numbered("x"),
            y: ChartAxis::numbered("y"),
        }
    }

    fn plot(sketch: Sketch, values: &[f64], labels: Option<&Labels>) -> Plot {
        match sketch.draw(values, labels).unwrap() {
            (name, Shown::Plot(plot)) if name == "a" => *plot,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bars_have_errors_if_there_are_three_rows() {
        let series = |size: &[i64], values: &[f64]| match plot(sketch(bars(), size), values, None) {
            Plot::Bars(mut bars) => bars.series.remove(0),
            other => panic!("{other:?}"),
        };
        let plain = series(&[2], &[1.0, 2.0]);
        assert_eq!((plain.y, plain.error), (vec![1.0, 2.0], vec![]));
        let framed = series(&[3, 2], &[1.0, 2.0, 0.1, 0.2, 0.3, 0.4]);
        assert_eq!(framed.y, [1.0, 2.0]);
        assert_eq!(framed.error, [(0.1, 0.3), (0.2, 0.4)]);
    }

    #[test]
    fn axes_are_named_by_experts_and_tokens() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect();
        let labels = Labels {
            inputs: words("a b c d"),
            targets: words("b c d e"),
        };
        let range = |from_end, n| TokenRange { from_end, n };
        let axis = |parts| ChartAxis {
            label: "x".to_owned(),
            parts,
        };
        let kind = ChartKind::Frames {
            x: axis(vec![
                AxisPart::Names(words("o0")),
                AxisPart::Inputs(range(2, 2)),
            ]),
            y: axis(vec![AxisPart::Targets(range(5, 2))]),
            range: Some((0.0, 1.0)),
            titles: words("0 3"),
        };
        let values: Vec<f64> = (0..12).map(f64::from).collect();
        let Plot::Frames(frames) = plot(sketch(kind, &[2, 2, 3]), &values, Some(&labels)) else {
            panic!("no frames");
        };
        assert_eq!(frames.x.names, ["o0", "c", "d"]);
        // The first token was read before this run began.
        assert_eq!(frames.y.names, ["", "b"]);
        assert_eq!(frames.frames[1].0, "3");
        assert_eq!(frames.frames[1].1.values, [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
    }

    #[test]
    fn a_shape_that_does_not_fit_is_an_error() {
        let heatmap = ChartKind::Heatmap {
            x: ChartAxis::numbered("x"),
            y: ChartAxis::numbered("y"),
            range: None,
        };
        for (kind, size, values) in [
            (ChartKind::Number, &[2][..], &[1.0, 2.0][..]),
            (bars(), &[2, 2], &[1.0; 4]),
            (heatmap, &[4], &[1.0; 4]),
        ] {
            let error = sketch(kind, size).draw(values, None).unwrap_err();
            assert!(
                error.why.contains("`a`") && error.fix.contains("none"),
                "{error}"
            );
        }
    }
}
