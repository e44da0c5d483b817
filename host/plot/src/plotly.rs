//! Charts as figures of Plotly, which Weights & Biases shows with zoom and values under the pointer.

use crate::color;
use crate::heatmap;
use crate::plot::{Axis, Bars, Heatmap, Plot, Scale, Series, XyChart};
use serde_json::{Value, json};

impl Plot {
    /// The figure, `{"data": […], "layout": {…}}`; none for what dashboards have a form of their own for: tables,
    /// histograms, pictures and animations. NaN and infinities, which JSON has not, are `null`: Plotly leaves them out.
    pub fn to_plotly(&self, title: &str) -> Option<Value> {
        match self {
            Plot::Table(_) | Plot::Histogram(_) | Plot::Images(_) | Plot::Frames(_) => None,
            Plot::Bars(chart) => Some(bars(chart, title)),
            Plot::Xy(chart) => Some(xy(chart, title)),
            Plot::Heatmap(chart) => Some(of_heatmap(chart, title)),
            Plot::Confusion(confusion) => {
                Some(of_heatmap(&heatmap::of_confusion(confusion), title))
            }
            Plot::Clustermap(map) => {
                let (chart, clusters) = heatmap::of_clustermap(map);
                let mut figure = of_heatmap(&chart, title);
                let boxes = clusters
                    .iter()
                    .map(|&(first, length)| frame((first, first), length, "white"));
                figure["layout"]["shapes"] = boxes.collect();
                Some(figure)
            }
        }
    }
}

fn bars(chart: &Bars, title: &str) -> Value {
    let data = each(&chart.series, |index, series| {
        let mut trace = trace(series, index, chart.series.len());
        trace["type"] = "bar".into();
        if chart.shows_values {
            trace["texttemplate"] = "%{y:.2f}".into();
        }
        if !chart.x.names.is_empty() {
            trace["x"] = chart.x.names.clone().into();
        }
        trace
    });
    let mut layout = layout(title, &chart.x, &chart.y, chart.series.len());
    layout["barmode"] = "group".into();
    json!({ "data": data, "layout": layout })
}

fn xy(chart: &XyChart, title: &str) -> Value {
    let data = each(&chart.series, |index, series| {
        let mut trace = trace(series, index, chart.series.len());
        trace["type"] = "scatter".into();
        trace["mode"] = if series.is_points { "markers" } else { "lines" }.into();
        trace
    });
    let layout = layout(title, &chart.x, &chart.y, chart.series.len());
    json!({ "data": data, "layout": layout })
}

fn each(series: &[Series], trace: impl Fn(usize, &Series) -> Value) -> Vec<Value> {
    series
        .iter()
        .enumerate()
        .map(|(index, series)| trace(index, series))
        .collect()
}

fn trace(series: &Series, index: usize, n: usize) -> Value {
    let color = color::series(index, n).to_string();
    let mut trace = json!({
        "name": series.name,
        "y": series.y,
        "marker": { "color": color },
        "line": { "color": color },
    });
    if !series.x.is_empty() {
        trace["x"] = json!(series.x);
    }
    if !series.error.is_empty() {
        let (below, above): (Vec<f64>, Vec<f64>) = series.error.iter().copied().unzip();
        trace["error_y"] =
            json!({ "type": "data", "symmetric": false, "arrayminus": below, "array": above });
    }
    trace
}

fn of_heatmap(chart: &Heatmap, title: &str) -> Value {
    let rows: Vec<&[f32]> = chart.matrix.rows().collect();
    let scale: Vec<Value> = (0..=10u8)
        .map(|step| {
            let at = f32::from(step) / 10.0;
            json!([at, color::heat(at).to_string()])
        })
        .collect();
    let mut trace = json!({ "type": "heatmap", "z": rows, "colorscale": scale });
    if let Some((low, high)) = chart.range {
        trace["zmin"] = json!(low);
        trace["zmax"] = json!(high);
    }
    if !chart.scale.is_empty() {
        trace["colorbar"] = json!({ "title": { "text": chart.scale } });
    }
    if chart.shows_values {
        trace["texttemplate"] = "%{z:.2f}".into();
    }
    let mut layout = layout(title, &chart.x, &chart.y, 1);
    // Names stand at numbers instead of being places: Plotly would merge two rows of the same name.
    for (axis, names) in [("xaxis", &chart.x.names), ("yaxis", &chart.y.names)] {
        if !names.is_empty() {
            layout[axis]["tickvals"] = (0..names.len()).collect();
            layout[axis]["ticktext"] = names.clone().into();
        }
    }
    layout["yaxis"]["autorange"] = "reversed".into();
    let marks = chart.marks.iter().map(|&mark| frame(mark, 1, "red"));
    layout["shapes"] = marks.collect();
    json!({ "data": [trace], "layout": layout })
}

/// A frame around `length` rows and columns from a cell on.
fn frame((row, col): (usize, usize), length: usize, color: &str) -> Value {
    let (x, y, length) = (col as f64 - 0.5, row as f64 - 0.5, length as f64);
    json!({
        "type": "rect",
        "x0": x, "x1": x + length,
        "y0": y, "y1": y + length,
        "line": { "color": color },
    })
}

fn layout(title: &str, x: &Axis, y: &Axis, n_series: usize) -> Value {
    json!({
        "title": { "text": title },
        "showlegend": n_series > 1,
        "xaxis": axis(x),
        "yaxis": axis(y),
    })
}

fn axis(axis: &Axis) -> Value {
    let mut json = json!({ "title": { "text": axis.label } });
    if axis.scale == Scale::Log {
        json["type"] = "log".into();
    }
    if let Some((low, high)) = axis.limits {
        // Plotly wants the limits of a logarithmic axis as exponents of ten.
        json["range"] = match axis.scale {
            Scale::Linear => json!([low, high]),
            Scale::Log => json!([low.log10(), high.log10()]),
        };
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plot::Matrix;

    #[test]
    fn series_carry_their_errors_and_gaps() {
        let chart = XyChart {
            y: Axis {
                scale: Scale::Log,
                limits: Some((0.1, 100.0)),
                ..Axis::default()
            },
            series: vec![Series {
                name: "a".to_owned(),
                y: vec![1.0, f64::NAN],
                error: vec![(0.5, 0.25), (0.0, 0.0)],
                ..Series::default()
            }],
            ..XyChart::default()
        };
        let figure = Plot::Xy(chart).to_plotly("t").unwrap();
        let trace = &figure["data"][0];
        assert_eq!(trace["y"], json!([1.0, null]));
        assert_eq!(trace["error_y"]["arrayminus"], json!([0.5, 0.0]));
        assert_eq!(trace["mode"], "lines");
        assert_eq!(figure["layout"]["yaxis"]["range"], json!([-1.0, 2.0]));
        assert_eq!(figure["layout"]["title"]["text"], "t");
    }

    #[test]
    fn the_first_row_is_at_the_top_and_marks_are_frames() {
        let chart = Heatmap {
            matrix: Matrix {
                n_rows: 1,
                n_cols: 2,
                values: vec![0.0, f32::NAN],
            },
            marks: vec![(0, 1)],
            ..Heatmap::default()
        };
        let figure = Plot::Heatmap(chart).to_plotly("").unwrap();
        assert_eq!(figure["data"][0]["z"], json!([[0.0, null]]));
        assert_eq!(figure["layout"]["yaxis"]["autorange"], "reversed");
        assert_eq!(figure["layout"]["shapes"][0]["x0"], 0.5);
        assert_eq!(figure["layout"]["shapes"][0]["y1"], 0.5);
    }
}
