//! Whatever a chart is given, it is a picture: SVG that a parser takes, PNG and GIF that decoders take.

use moeut_plot::{
    Axis, Bars, Clustermap, Confusion, Frames, Heatmap, Histogram, Image, Matrix, Plot, Scale,
    Series, Table, XyChart,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// Numbers of all sizes, and those that are none.
fn number() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => -10.0..10.0,
        1 => any::<f64>(),
        1 => prop::sample::select(vec![0.0, 1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e308, -1e308, 5e-324]),
    ]
}

fn single() -> impl Strategy<Value = f32> {
    #[expect(clippy::cast_possible_truncation, reason = "infinities are wanted too")]
    number().prop_map(|number| number as f32)
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-z]{0,8}",
        2 => any::<String>(),
        1 => Just("<svg>&\"'\u{0}\u{7}\n\u{ffff}</text>".to_owned()),
        1 => "[a-zα-ω▁]{40,60}",
    ]
}

fn axis() -> impl Strategy<Value = Axis> {
    let limits = prop::option::of((number(), number()));
    (name(), any::<bool>(), vec(name(), 0..6), limits).prop_map(|(label, is_log, names, limits)| {
        Axis {
            label,
            scale: if is_log { Scale::Log } else { Scale::Linear },
            names,
            limits,
        }
    })
}

fn series() -> impl Strategy<Value = Series> {
    let numbers = || vec(number(), 0..50);
    (
        name(),
        numbers(),
        numbers(),
        vec((number(), number()), 0..50),
        any::<bool>(),
    )
        .prop_map(|(name, x, y, error, is_points)| Series {
            name,
            x,
            y,
            error,
            is_points,
        })
}

fn matrix() -> impl Strategy<Value = Matrix> {
    let size = || prop_oneof![8 => 0usize..9, 1 => 30usize..60, 1 => Just(usize::MAX)];
    (size(), size(), vec(single(), 0..3000)).prop_map(|(n_rows, n_cols, values)| Matrix {
        n_rows,
        n_cols,
        values,
    })
}

fn heatmap() -> impl Strategy<Value = Heatmap> {
    let range = prop::option::of((single(), single()));
    let marks = vec((0usize..9, 0usize..9), 0..4);
    let scale = (range, name(), name());
    (matrix(), axis(), axis(), scale, any::<bool>(), marks).prop_map(
        |(matrix, x, y, (range, scale, missing), shows_values, marks)| Heatmap {
            matrix,
            x,
            y,
            range,
            shows_values,
            marks,
            scale,
            missing,
        },
    )
}

fn frames() -> impl Strategy<Value = Frames> {
    let range = prop::option::of((single(), single()));
    (vec((name(), matrix()), 0..20), axis(), axis(), range).prop_map(|(frames, x, y, range)| {
        Frames {
            frames,
            x,
            y,
            range,
        }
    })
}

fn histogram() -> impl Strategy<Value = Histogram> {
    let any_bins =
        (vec(number(), 0..70), vec(any::<u64>(), 0..70)).prop_map(|(edges, counts)| Histogram {
            edges,
            counts,
            sum: f64::NAN,
            sum_squares: 0.0,
            range: (1.0, -1.0),
        });
    prop_oneof![
        any_bins,
        vec(number(), 0..50).prop_map(Histogram::linear),
        vec(number(), 0..50).prop_map(Histogram::log2),
    ]
}

fn image() -> impl Strategy<Value = Image> {
    let side = || prop_oneof![6 => 0u32..40, 1 => Just(5_000u32)];
    (side(), side(), vec(any::<u8>(), 0..300), name()).prop_map(|(width, height, rgb, caption)| {
        Image {
            width,
            height,
            rgb,
            caption,
        }
    })
}

fn plot() -> impl Strategy<Value = Plot> {
    let row = || vec(name(), 0..6);
    let all_series = || vec(series(), 0..9);
    prop_oneof![
        (row(), vec(row(), 0..130)).prop_map(|(header, rows)| Table { header, rows }.into()),
        histogram().prop_map(Plot::from),
        vec(image(), 0..6).prop_map(Plot::from),
        (axis(), axis(), all_series(), any::<bool>()).prop_map(|(x, y, series, shows_values)| {
            Bars {
                x,
                y,
                series,
                shows_values,
            }
            .into()
        }),
        (axis(), axis(), all_series()).prop_map(|(x, y, series)| XyChart { x, y, series }.into()),
        heatmap().prop_map(Plot::from),
        (matrix(), row()).prop_map(|(counts, names)| Confusion { counts, names }.into()),
        (matrix(), row()).prop_map(|(matrix, names)| Clustermap { matrix, names }.into()),
        frames().prop_map(Plot::from),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// The parser also refuses characters that XML forbids.
    #[test]
    fn every_chart_is_well_formed_svg(plot in plot(), title in name()) {
        let svg = plot.to_svg(&title);
        let document = match roxmltree::Document::parse(&svg) {
            Ok(document) => document,
            Err(error) => return Err(TestCaseError::fail(format!("{error}\n{svg}"))),
        };
        let values = document.descendants().flat_map(|node| node.attributes()).map(|attribute| attribute.value());
        let are_numbers = values.filter(|value| !value.starts_with("data:")).all(|value| {
            !value.contains("NaN") && !value.contains("inf")
        });
        prop_assert!(are_numbers, "{svg}");
    }

    /// JSON has neither NaN nor infinity.
    #[test]
    fn every_figure_of_plotly_survives_its_text(plot in plot(), title in name()) {
        if let Some(figure) = plot.to_plotly(&title) {
            let text = figure.to_string();
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), figure);
        }
    }
}

proptest! {
    // These take a thousand times as long as text.
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn every_chart_is_a_png(plot in plot(), title in name()) {
        let file = plot.to_png(&title);
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        prop_assert!(reader.next_frame(&mut pixels).is_ok());
    }

    #[test]
    fn every_animation_is_a_gif(frames in frames()) {
        let file = frames.to_gif();
        let mut decoder = gif::DecodeOptions::new().read_info(&file[..]).unwrap();
        let mut n_frames = 0;
        while decoder.read_next_frame().unwrap().is_some() {
            n_frames += 1;
        }
        prop_assert_eq!(n_frames, frames.frames.len().max(1));
    }
}

/// Names of charts and ticks are text of the document, whatever is in them.
#[test]
fn markup_in_names_is_shown_as_it_is() {
    let chart = XyChart {
        x: Axis::new("steps <k> & \"more\""),
        series: vec![Series::new("", vec![1.0, 2.0])],
        ..XyChart::default()
    };
    let svg = Plot::from(chart).to_svg("a < b");
    let document = roxmltree::Document::parse(&svg).unwrap();
    let texts: Vec<&str> = document
        .descendants()
        .filter_map(|node| node.text())
        .collect();
    assert!(
        texts.contains(&"a < b") && texts.contains(&"steps <k> & \"more\""),
        "{texts:?}"
    );
}

#[test]
fn a_chart_without_data_says_so() {
    for plot in [
        Plot::from(XyChart::default()),
        Bars::default().into(),
        Heatmap::default().into(),
        Histogram::linear([]).into(),
        Frames::default().into(),
    ] {
        assert!(plot.to_svg("").contains(">no data<"), "{plot:?}");
    }
}
