//! Charts of a model, as data: numbers on its device, and how to show them. The host draws.

use crate::TensorHandle;
use serde::{Deserialize, Serialize};

/// One thing to show.
#[derive(Debug)]
pub struct Chart {
    /// Its full name in the logs.
    pub name: String,
    /// What it is.
    pub kind: ChartKind,
    /// The numbers, on the model's device; nobody has waited for them. The kind says their shape.
    pub values: TensorHandle,
}

/// What a chart is, and the shape of its values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ChartKind {
    /// One number, of any shape with one element.
    Number,
    /// Bars beside each other: heights `[n]`, or `[3, n]` with the lengths of error bars below and above them.
    Bars {
        /// Places.
        x: ChartAxis,
        /// Heights.
        y: ChartAxis,
    },
    /// Numbers as colours, `[rows, columns]`, the first row on top.
    Heatmap {
        /// Columns.
        x: ChartAxis,
        /// Rows.
        y: ChartAxis,
        /// Values of the first and the last colour; those of the chart if absent.
        range: Option<(f32, f32)>,
    },
    /// Heat maps one after the other, `[frames, rows, columns]`.
    Frames {
        /// Columns.
        x: ChartAxis,
        /// Rows.
        y: ChartAxis,
        /// Values of the first and the last colour; those of all frames if absent.
        range: Option<(f32, f32)>,
        /// One for each frame.
        titles: Vec<String>,
    },
}

/// One side of a chart.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ChartAxis {
    /// What it is.
    pub label: String,
    /// Names of its places, part after part; numbers if empty.
    pub parts: Vec<AxisPart>,
}

impl ChartAxis {
    /// An axis whose places have numbers.
    pub fn numbered(label: &str) -> Self {
        Self {
            label: label.to_owned(),
            parts: Vec::new(),
        }
    }
}

/// Names of neighbouring places.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AxisPart {
    /// As they are.
    Names(Vec<String>),
    /// Tokens that the model read.
    Inputs(TokenRange),
    /// Tokens that it should have predicted from those.
    Targets(TokenRange),
}

/// Some tokens of the batch's first sequence, which segment memory lengthens at its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRange {
    /// How many tokens there are from the first of them to the end of the sequence.
    pub from_end: u64,
    /// How many are meant.
    pub n: u64,
}
