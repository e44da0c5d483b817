//! Charts of series: lines, points, bars, histograms.

use crate::axes::{self, GAP, LINE_HEIGHT, MARGIN, SIZE, Side, one_line};
use crate::color::{self, INK, WHITE};
use crate::drawing::{Anchor, Area, Drawing, Shape, Text};
use crate::font;
use crate::plot::{Axis, Bars, Histogram, Scale, Series, XyChart};
use crate::ticks::{Span, Tick, every, number};

/// Size of the area with the data.
const WIDTH: f32 = 520.0;
const HEIGHT: f32 = 300.0;
/// How far above the axis bars are torn, and how far the tear goes up and down from there.
const TEAR: f32 = 10.0;
const TEAR_HALF: f32 = 2.5;
/// Numbers along an axis.
const N_TICKS: usize = 6;
/// Series in a legend; of more, every second, fifth, … is named.
const MAX_NAMED: usize = 18;
/// Lines with more points do not mark each, and show their errors as a band.
const MAX_MARKS: usize = 40;

impl Series {
    fn x(&self, index: usize) -> f64 {
        if self.x.is_empty() {
            index as f64
        } else {
            self.x.get(index).copied().unwrap_or(f64::NAN)
        }
    }

    fn points(&self) -> impl Iterator<Item = (f64, f64)> {
        self.y
            .iter()
            .enumerate()
            .map(|(index, &y)| (self.x(index), y))
    }

    /// Lower and upper end of the error bar at a value.
    fn error(&self, index: usize) -> Option<(f64, f64)> {
        let (&(below, above), &y) = (self.error.get(index)?, self.y.get(index)?);
        Some((y - below.abs(), y + above.abs()))
    }

    /// What the y axis has to show.
    fn heights(&self) -> impl Iterator<Item = f64> {
        let errors = (0..self.error.len()).filter_map(|index| self.error(index));
        let errors = errors.flat_map(|(low, high)| [low, high]);
        self.y.iter().copied().chain(errors)
    }
}

/// Lines and points.
pub(crate) fn xy(chart: &XyChart, title: &str) -> Drawing {
    let xs = chart.series.iter().flat_map(|s| s.points().map(|(x, _)| x));
    let x_span = Span::of(&chart.x, xs, 0.02);
    let y_span = Span::of(
        &chart.y,
        chart.series.iter().flat_map(Series::heights),
        0.05,
    );
    let x = Side::of_span(&chart.x.label, &x_span, N_TICKS);
    let y = Side::of_span(&chart.y.label, &y_span, N_TICKS);
    let legend = Legend::new(&chart.series);
    let (mut drawing, area) = axes::chart(title, (WIDTH, HEIGHT), &x, &y, legend.width);
    let place = |x: f64, y: f64| Some(area.at(x_span.place(x)?, y_span.place(y)?));
    let mut is_empty = true;
    for (index, series) in chart.series.iter().enumerate() {
        let color = color::series(index, chart.series.len());
        draw_errors(&mut drawing, &area, series, color, place);
        let points: Vec<_> = series.points().map(|(x, y)| place(x, y)).collect();
        is_empty &= points.iter().all(Option::is_none);
        for run in points.split(Option::is_none) {
            let run: Vec<(f32, f32)> = run.iter().copied().flatten().collect();
            match run[..] {
                [] => {}
                _ if series.is_points => dots(&mut drawing, &area, &run, color),
                [_] => dots(&mut drawing, &area, &run, color),
                _ if run.len() > MAX_MARKS => line(&mut drawing, &area, &thinned(run), color),
                _ => {
                    line(&mut drawing, &area, &run, color);
                    dots(&mut drawing, &area, &run, color);
                }
            }
        }
    }
    if is_empty {
        axes::say_empty(&mut drawing, &area);
    }
    axes::finish(&mut drawing, &area, &x, &y);
    legend.draw(&mut drawing, &area);
    drawing
}

fn dots(drawing: &mut Drawing, area: &Area, points: &[(f32, f32)], fill: color::Color) {
    let inside = points
        .iter()
        .filter(|&&point| area.clip(point, point).is_some());
    let dots = inside.map(|&(x, y)| Shape::Dot {
        x,
        y,
        radius: 2.5,
        fill,
    });
    drawing.shapes.extend(dots);
}

/// Draws what is inside the area of a line.
fn line(drawing: &mut Drawing, area: &Area, points: &[(f32, f32)], color: color::Color) {
    let mut inside: Vec<(f32, f32)> = Vec::new();
    for pair in points.windows(2) {
        let Some((from, to)) = area.clip(pair[0], pair[1]) else {
            continue;
        };
        if inside.last() != Some(&from) {
            if inside.len() > 1 {
                drawing.line(std::mem::take(&mut inside), color, 1.5);
            }
            inside = vec![from];
        }
        inside.push(to);
    }
    if inside.len() > 1 {
        drawing.line(inside, color, 1.5);
    }
}

/// Of each half unit of width the first, lowest, highest and last point: the picture stays as it is, and a curve of a
/// million steps takes no more room than one of a thousand.
fn thinned(points: Vec<(f32, f32)>) -> Vec<(f32, f32)> {
    if points.len() <= 4 * 1024 || !points.is_sorted_by(|a, b| a.0 <= b.0) {
        return points;
    }
    let mut kept: Vec<(f32, f32)> = Vec::new();
    for column in points.chunk_by(|a, b| (a.0 * 2.0).floor() >= (b.0 * 2.0).floor()) {
        let by_height = |a: &&(f32, f32), b: &&(f32, f32)| a.1.total_cmp(&b.1);
        let ends = [column.first(), column.last()];
        let extremes = [
            column.iter().min_by(by_height),
            column.iter().max_by(by_height),
        ];
        let mut four: Vec<(f32, f32)> = ends
            .into_iter()
            .chain(extremes)
            .flatten()
            .copied()
            .collect();
        four.sort_by(|a, b| a.0.total_cmp(&b.0));
        four.dedup();
        kept.extend(four);
    }
    kept
}

/// Draws errors as bars, or as a band where there are many.
fn draw_errors(
    drawing: &mut Drawing,
    area: &Area,
    series: &Series,
    color: color::Color,
    place: impl Fn(f64, f64) -> Option<(f32, f32)>,
) {
    let ends = |index: usize| {
        let (low, high) = series.error(index)?;
        let x = series.x(index);
        Some((area.clamp(place(x, low)?), area.clamp(place(x, high)?)))
    };
    if series.is_points || series.y.len() <= MAX_MARKS {
        for (low, high) in (0..series.error.len()).filter_map(ends) {
            error_bar(drawing, low.0, low.1, high.1, color);
        }
        return;
    }
    let ends: Vec<_> = (0..series.error.len()).map(ends).collect();
    for run in ends.split(Option::is_none).filter(|run| run.len() > 1) {
        let low = run.iter().flatten().map(|ends| ends.0);
        let high = run.iter().flatten().map(|ends| ends.1);
        drawing.shapes.push(Shape::Band {
            points: low.chain(high.rev()).collect(),
            fill: color,
            opacity: 0.2,
        });
    }
}

fn error_bar(drawing: &mut Drawing, x: f32, low: f32, high: f32, color: color::Color) {
    const HALF: f32 = 3.0;
    drawing.line(vec![(x, low), (x, high)], color, 1.0);
    for y in [low, high] {
        drawing.line(vec![(x - HALF, y), (x + HALF, y)], color, 1.0);
    }
}

/// Bars, those of several series beside each other. Where the axis does not reach down to zero, bars and axis are torn:
/// lengths say nothing there, and nobody is to believe that they do.
pub(crate) fn bars(bars: &Bars, title: &str) -> Drawing {
    let n_places = bars.series.iter().map(|s| s.y.len()).max().unwrap_or(0);
    let values = bars.series.iter().flat_map(Series::heights);
    let y_span = Span::from_zero(&bars.y, values, 0.05);
    // Numbered places may have numbers of their own: the series' x.
    let mut names = bars.x.names.clone();
    if let (true, Some(first)) = (names.is_empty(), bars.series.first()) {
        names = first
            .x
            .iter()
            .map(|&x| number(x, 1e-3_f64.max(x.abs() * 1e-3), x))
            .collect();
    }
    let x = Side::across(&bars.x.label, &names, n_places, WIDTH);
    let mut y = Side::of_span(&bars.y.label, &y_span, N_TICKS);
    let is_torn = y_span.place(0.0).is_none_or(|zero| zero < 0.0);
    if is_torn {
        // No number under the tear.
        let axis = Area {
            height: HEIGHT,
            ..Area::default()
        };
        let torn = axis.bottom() - TEAR;
        let distance = |tick: &Tick| (axis.at(0.0, tick.at).1 - torn).abs();
        y.ticks
            .retain(|tick| distance(tick) > TEAR_HALF + SIZE / 2.0);
    }
    let legend = Legend::new(&bars.series);
    let (mut drawing, area) = axes::chart(title, (WIDTH, HEIGHT), &x, &y, legend.width);
    let n_series = bars.series.len();
    let slot = area.width / n_places.max(1) as f32;
    let width = slot * if slot > 4.0 { 0.8 } else { 1.0 } / n_series.max(1) as f32;
    let ground = area.at(0.0, y_span.place(0.0).unwrap_or(0.0)).1;
    let values = bars.series.iter().flat_map(|series| &series.y);
    let n_digits = if values.into_iter().any(|value| value.abs() >= 100.0) {
        1
    } else {
        2
    };
    for (index, series) in bars.series.iter().enumerate() {
        let color = color::series(index, n_series);
        for (place, &value) in series.y.iter().enumerate() {
            let Some(height) = y_span.place(value) else {
                continue;
            };
            let middle = area.left + (place as f32 + 0.5) * slot;
            let left = middle + (index as f32 - n_series as f32 / 2.0) * width;
            let (_, top) = area.clamp(area.at(0.0, height));
            drawing.fill(bar(left, width, top, area.clamp((left, ground)).1), color);
            let ends = series.error(place).and_then(|(low, high)| {
                let low = y_span.place(low).unwrap_or(0.0);
                Some((low, y_span.place(high)?))
            });
            if let Some((low, high)) = ends {
                let [low, high] = [low, high].map(|at| area.clamp(area.at(0.0, at)).1);
                error_bar(&mut drawing, left + width / 2.0, low, high, INK);
            }
            if bars.shows_values {
                let text = format!("{value:.n_digits$}");
                write_above(&mut drawing, (left, top, width), &text);
            }
        }
    }
    if bars.series.iter().all(|series| series.y.is_empty()) {
        axes::say_empty(&mut drawing, &area);
    }
    axes::finish(&mut drawing, &area, &x, &y);
    if is_torn {
        tear(&mut drawing, &area);
    }
    legend.draw(&mut drawing, &area);
    drawing
}

/// A white zigzag across the feet of all bars and the axis beside them.
fn tear(drawing: &mut Drawing, area: &Area) {
    const STEP: f32 = 5.0;
    let (left, middle) = (area.left - 2.0 * STEP, area.bottom() - TEAR);
    let mut points = vec![(left, middle)];
    while let Some(&(x, y)) = points.last().filter(|(x, _)| *x < area.right()) {
        let side = if y < middle { TEAR_HALF } else { -TEAR_HALF };
        points.push((x + STEP, middle + side));
    }
    drawing.line(points, WHITE, 3.0);
}

/// Writes above a bar whose left upper corner and width are given, as large as the width allows.
fn write_above(drawing: &mut Drawing, (left, top, width): (f32, f32, f32), text: &str) {
    let size = SIZE.min(SIZE * width / font::width(text, SIZE));
    drawing.text(Text {
        size,
        ..axes::label(left + width / 2.0, top - 3.0, text, Anchor::Middle)
    });
}

fn bar(left: f32, width: f32, from: f32, to: f32) -> Area {
    Area {
        left,
        top: from.min(to),
        width,
        height: (from - to).abs(),
    }
}

/// Counts by bin.
pub(crate) fn histogram(histogram: &Histogram, title: &str) -> Drawing {
    let edges = &histogram.edges;
    let x_axis = Axis {
        scale: if histogram.is_log() {
            Scale::Log
        } else {
            Scale::Linear
        },
        ..Axis::default()
    };
    let x_span = Span::of(&x_axis, edges.iter().copied(), 0.0);
    let counts = histogram.counts.iter().map(|&count| count as f64);
    let y_span = Span::from_zero(&Axis::default(), counts, 0.05);
    let x = Side::of_span("", &x_span, N_TICKS);
    let y = Side::of_span("values", &y_span, N_TICKS);
    let (mut drawing, area) = axes::chart(title, (WIDTH, HEIGHT), &x, &y, 0.0);
    for (edges, &count) in edges.windows(2).zip(&histogram.counts) {
        let places = (x_span.place(edges[0]), x_span.place(edges[1]));
        let ((Some(left), Some(right)), Some(height)) = (places, y_span.place(count as f64)) else {
            continue;
        };
        let (left, top) = area.clamp(area.at(left, height));
        let (right, ground) = area.clamp(area.at(right, 0.0));
        let width = (right - left - 0.5).max(0.5);
        drawing.fill(bar(left, width, top, ground), color::series(0, 1));
    }
    if histogram.counts.iter().all(|&count| count == 0) {
        axes::say_empty(&mut drawing, &area);
    }
    axes::finish(&mut drawing, &area, &x, &y);
    drawing
}

/// Which colour is which series; nothing for a single one.
struct Legend {
    entries: Vec<(String, color::Color)>,
    /// Room that it needs beside the chart.
    width: f32,
}

impl Legend {
    const SWATCH: f32 = 14.0;

    fn new(series: &[Series]) -> Self {
        let n = series.len();
        if n < 2 {
            return Self {
                entries: Vec::new(),
                width: 0.0,
            };
        }
        let every = every(n as f32 / MAX_NAMED as f32);
        let named = series.iter().enumerate().step_by(every);
        let entries: Vec<_> = named
            .map(|(index, series)| (one_line(&series.name, 150.0), color::series(index, n)))
            .collect();
        let widest = entries.iter().map(|(name, _)| font::width(name, SIZE));
        let width = widest.fold(0.0, f32::max) + 2.0 * GAP + Self::SWATCH + GAP + MARGIN;
        Self { entries, width }
    }

    fn draw(&self, drawing: &mut Drawing, area: &Area) {
        let left = area.right() + 2.0 * GAP;
        for (index, (name, color)) in self.entries.iter().enumerate() {
            let top = area.top + index as f32 * LINE_HEIGHT;
            drawing.fill(
                Area {
                    left,
                    top: top + 2.0,
                    width: Self::SWATCH,
                    height: 8.0,
                },
                *color,
            );
            let x = left + Self::SWATCH + GAP;
            drawing.text(axes::label(x, top + 10.0, name, Anchor::Start));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_keeps_its_peaks() {
        let mut points: Vec<(f32, f32)> = (0u16..60_000)
            .map(|index| (f32::from(index) / 120.0, 100.0))
            .collect();
        points[31_234].1 = 7.0;
        let kept = thinned(points.clone());
        assert!(kept.len() < 3000, "{}", kept.len());
        assert!(kept.contains(&points[31_234]));
        assert_eq!(kept.first(), points.first());
        assert_eq!(kept.last(), points.last());
    }

    #[test]
    fn a_line_is_cut_at_the_limits_and_at_gaps() {
        let chart = XyChart {
            y: Axis {
                limits: Some((0.0, 1.0)),
                ..Axis::default()
            },
            series: vec![Series {
                y: vec![0.5, 0.6, f64::NAN, 0.5, 9.0, 0.5],
                ..Series::default()
            }],
            ..XyChart::default()
        };
        let drawing = xy(&chart, "");
        let lines = drawing.shapes.iter().filter_map(|shape| match shape {
            Shape::Line { points, stroke, .. } if *stroke == color::series(0, 1) => Some(points),
            _ => None,
        });
        let lines: Vec<_> = lines.collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        let heights = lines
            .iter()
            .flat_map(|points| points.iter().map(|point| point.1));
        let (top, bottom) = heights.fold((f32::MAX, f32::MIN), |(top, bottom), y| {
            (top.min(y), bottom.max(y))
        });
        assert!(bottom - top <= HEIGHT);
    }

    /// White lines, and texts.
    fn tears_and_texts(chart: &Bars) -> (usize, Vec<String>) {
        let shapes = bars(chart, "").shapes;
        let is_tear =
            |shape: &&Shape| matches!(shape, Shape::Line { stroke, .. } if *stroke == WHITE);
        let n_tears = shapes.iter().filter(is_tear).count();
        let texts = shapes.into_iter().filter_map(|shape| match shape {
            Shape::Text(text) => Some(text.content),
            _ => None,
        });
        (n_tears, texts.collect())
    }

    #[test]
    fn bars_that_do_not_begin_at_zero_are_torn_and_their_values_are_written() {
        let mut chart = Bars {
            series: vec![Series::new("", vec![12.345, 23.45, f64::NAN])],
            shows_values: true,
            ..Bars::default()
        };
        let (n_tears, texts) = tears_and_texts(&chart);
        assert_eq!(n_tears, 0);
        assert!(texts.contains(&"12.35".to_owned()), "{texts:?}");
        assert!(texts.contains(&"23.45".to_owned()), "{texts:?}");
        assert!(!texts.contains(&"NaN".to_owned()), "{texts:?}");
        chart.series[0].y[1] = 123.46;
        chart.y.limits = Some((10.0, 130.0));
        let (n_tears, texts) = tears_and_texts(&chart);
        assert_eq!(n_tears, 1);
        assert!(texts.contains(&"12.3".to_owned()), "{texts:?}");
        assert!(texts.contains(&"123.5".to_owned()), "{texts:?}");
        chart.y.limits = Some((18.0, 130.0));
        let (_, texts) = tears_and_texts(&chart);
        assert!(texts.contains(&"40".to_owned()), "{texts:?}");
        assert!(!texts.contains(&"20".to_owned()), "{texts:?}");
        chart.y.scale = Scale::Log;
        assert_eq!(tears_and_texts(&chart).0, 1);
    }

    #[test]
    fn bars_grow_from_zero_in_both_directions() {
        let chart = Bars {
            series: vec![Series {
                y: vec![2.0, -1.0],
                ..Series::default()
            }],
            ..Bars::default()
        };
        let drawing = bars(&chart, "");
        let boxes: Vec<Area> = drawing
            .shapes
            .iter()
            .filter_map(|shape| match shape {
                Shape::Box { area, .. } => Some(*area),
                _ => None,
            })
            .collect();
        assert!((boxes[0].bottom() - boxes[1].top).abs() < 1e-3);
        assert!((boxes[0].height / boxes[1].height - 2.0).abs() < 1e-3);
    }
}
