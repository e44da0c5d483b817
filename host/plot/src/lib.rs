//! Charts of a training run.
//!
//! A [`Plot`] is data and labels, nothing drawn: each place that shows it chooses a form. TensorBoard takes pictures,
//! Weights & Biases Plotly's JSON, tables and media files, the report and the paper SVG.
//!
//! Reading order: `plot` (the data), `build` (from what producers have), `curves`, `heatmap`, `pictures` (one chart
//! each, as shapes), `axes` and `ticks` (what stands around them), `svg`, `raster`, `animation`, `plotly` (the forms).

mod animation;
mod axes;
mod build;
mod cluster;
mod color;
mod curves;
mod drawing;
mod font;
mod form;
mod heatmap;
mod pictures;
mod plot;
mod plotly;
mod raster;
mod svg;
mod ticks;

pub use plot::{
    Axis, Bars, Clustermap, Confusion, Frames, Heatmap, Histogram, Image, Matrix, Plot, Scale,
    Series, Table, XyChart,
};
