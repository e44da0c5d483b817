//! What a chart shows.

use serde::{Deserialize, Deserializer, Serialize};

/// One chart. The kinds are those of the reference's dashboards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Plot {
    /// Rows of text.
    Table(Table),
    /// How often values fall into bins.
    Histogram(Histogram),
    /// Pictures, in a grid if there are several.
    Images(Vec<Image>),
    /// One number, or one per series, at each of several places.
    Bars(Bars),
    /// Lines or points in a plane.
    Xy(XyChart),
    /// A matrix as colours.
    Heatmap(Heatmap),
    /// Which class was taken for which.
    Confusion(Confusion),
    /// How alike things are, with like ones side by side.
    Clustermap(Clustermap),
    /// Heat maps one after the other, two per second.
    Frames(Frames),
}

/// Rows of text under a header.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Names of the columns.
    pub header: Vec<String>,
    /// Each as long as the header.
    pub rows: Vec<Vec<String>>,
}

/// Counts of values by bin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// One more than `counts`, ascending; logarithmic bins have edges that are powers of two.
    pub edges: Vec<f64>,
    /// Values in `[edges[i], edges[i + 1])`; the last bin includes its end.
    pub counts: Vec<u64>,
    /// Sum of all values, and of their squares, which TensorBoard shows.
    pub sum: f64,
    /// See `sum`.
    pub sum_squares: f64,
    /// Smallest and largest value.
    pub range: (f64, f64),
}

/// Pixels, row by row from the top.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Three bytes a pixel: red, green, blue.
    pub rgb: Vec<u8>,
    /// Shown below.
    pub caption: String,
}

/// How an axis counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// Equal steps add.
    #[default]
    Linear,
    /// Equal steps multiply; values that are not positive are left out.
    Log,
}

/// One side of a chart.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Axis {
    /// What it is, with unit.
    pub label: String,
    /// How it counts.
    #[serde(default)]
    pub scale: Scale,
    /// Names of the places 0, 1, …; numbers if empty.
    #[serde(default)]
    pub names: Vec<String>,
    /// First and last value shown; all if absent.
    #[serde(default)]
    pub limits: Option<(f64, f64)>,
}

/// Bars beside each other.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Bars {
    /// Places.
    pub x: Axis,
    /// Heights.
    pub y: Axis,
    /// Several series stand beside each other at each place. `x` of a series may be empty: 0, 1, ….
    pub series: Vec<Series>,
    /// Write each number above its bar.
    #[serde(default)]
    pub shows_values: bool,
}

/// Numbers that belong together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Shown in the legend if there are several.
    pub name: String,
    /// As long as `y`, or empty for 0, 1, ….
    #[serde(default)]
    pub x: Vec<f64>,
    /// The values; NaN is a gap.
    #[serde(deserialize_with = "with_gaps")]
    pub y: Vec<f64>,
    /// Length of the error bar below and above each value; empty for none.
    #[serde(default)]
    pub error: Vec<(f64, f64)>,
    /// Points only, no line.
    #[serde(default)]
    pub is_points: bool,
}

/// Lines or points.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct XyChart {
    /// To the right.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// What is drawn.
    pub series: Vec<Series>,
}

/// Numbers in rows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Matrix {
    /// Rows.
    pub n_rows: usize,
    /// Columns.
    pub n_cols: usize,
    /// Row by row.
    #[serde(deserialize_with = "with_gaps")]
    pub values: Vec<f32>,
}

/// A matrix as colours.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Heatmap {
    /// The numbers; the first row is at the top.
    pub matrix: Matrix,
    /// Columns.
    pub x: Axis,
    /// Rows.
    pub y: Axis,
    /// Values of the first and last colour; those of the matrix if absent.
    #[serde(default)]
    pub range: Option<(f32, f32)>,
    /// Write each number into its cell.
    #[serde(default)]
    pub shows_values: bool,
    /// Cells with a frame: row, column.
    #[serde(default)]
    pub marks: Vec<(usize, usize)>,
    /// What the colours are, with unit; not said if empty.
    #[serde(default)]
    pub scale: String,
    /// What it means that a cell has no number and is grey; not said if empty.
    #[serde(default)]
    pub missing: String,
}

/// Counts of predicted (column) by true (row) class; shown as shares of each row.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Confusion {
    /// Counts.
    pub counts: Matrix,
    /// Names of the classes; numbers if empty.
    pub names: Vec<String>,
}

/// A symmetric matrix of similarities, whose rows and columns are put into an order in which like ones are neighbours.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Clustermap {
    /// The similarities.
    pub matrix: Matrix,
    /// Names of rows and columns; numbers if empty.
    pub names: Vec<String>,
}

/// An animation. All frames have the same axes and the same colours.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Frames {
    /// Title and numbers of each; all of the same size.
    pub frames: Vec<(String, Matrix)>,
    /// Columns.
    pub x: Axis,
    /// Rows.
    pub y: Axis,
    /// Values of the first and last colour; those of all frames if absent.
    #[serde(default)]
    pub range: Option<(f32, f32)>,
}

/// JSON has no NaN: it is `null` there.
fn with_gaps<'de, D: Deserializer<'de>, T: Deserialize<'de> + From<f32>>(
    source: D,
) -> Result<Vec<T>, D::Error> {
    let values = Vec::<Option<T>>::deserialize(source)?;
    let number = |value: Option<T>| value.unwrap_or_else(|| f32::NAN.into());
    Ok(values.into_iter().map(number).collect())
}
