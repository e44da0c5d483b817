//! Charts of a training run.
//!
//! A [`Plot`] is data and labels, nothing drawn: each place that shows it chooses a form. TensorBoard takes pictures,
//! Weights & Biases Plotly's JSON, tables and media files, the report and the paper SVG.

mod plot;

pub use plot::{
    Axis, Bars, Clustermap, Confusion, Frames, Heatmap, Histogram, Image, Matrix, Plot, Scale,
    Series, Table, XyChart,
};
