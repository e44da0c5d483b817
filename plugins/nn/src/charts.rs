//! Charts as layers make them.

use moeut_plugin_api::{Chart, ChartAxis, ChartKind};
use moeut_torch::IntoHandle;
use tch::Tensor;

/// One number.
pub fn number(name: impl Into<String>, value: &Tensor) -> Chart {
    chart(name.into(), ChartKind::Number, value)
}

/// Numbers as colours, `[rows, columns]`.
pub fn heatmap(
    name: impl Into<String>,
    [x, y]: [&str; 2],
    range: Option<(f32, f32)>,
    values: &Tensor,
) -> Chart {
    let kind = ChartKind::Heatmap {
        x: ChartAxis::numbered(x),
        y: ChartAxis::numbered(y),
        range,
    };
    chart(name.into(), kind, values)
}

/// How often each expert was selected, the most popular first: `[E]`, or `[3, E]` with error bars below and above.
pub fn usage_bars(name: impl Into<String>, values: &Tensor) -> Chart {
    let kind = ChartKind::Bars {
        x: ChartAxis::numbered("expert, by use"),
        y: ChartAxis::numbered("selections"),
    };
    chart(name.into(), kind, values)
}

/// The values leave the graph: nothing that is shown is trained.
pub(crate) fn chart(name: String, kind: ChartKind, values: &Tensor) -> Chart {
    Chart {
        name,
        kind,
        values: values.detach().into_handle(),
    }
}
