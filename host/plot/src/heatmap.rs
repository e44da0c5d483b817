//! Matrices as colours.

use crate::axes::{self, GAP, LINE_HEIGHT, MARGIN, SIZE, Side, write_title};
use crate::cluster;
use crate::color::{INK, MISSING, WHITE, heat};
use crate::drawing::{Anchor, Area, Drawing, Pixels, Shape};
use crate::font;
use crate::plot::{Axis, Clustermap, Confusion, Frames, Heatmap, Matrix, Scale};
use crate::ticks::{Span, Tick};

/// Room for the cells.
const MAX_WIDTH: f32 = 560.0;
const MAX_HEIGHT: f32 = 420.0;
/// Sides of a cell, where there is room for it.
const MAX_CELL: f32 = 28.0;
const MIN_CELL: f32 = 1.0;
/// Matrices with no more cells are drawn cell by cell, which prints well at any size; others as one picture.
const MAX_BOXES: usize = 1600;
/// Rows and columns that a picture shows one by one; of larger matrices it shows means.
const MAX_PIXELS: usize = 1024;
/// Cells that can have their numbers written in.
const MAX_NUMBERS: usize = 1600;
/// Frames shown side by side where nothing moves.
const MAX_STILLS: usize = 16;
const BAR_WIDTH: f32 = 12.0;
/// Above the scale, where its name stands, so that its last number does not stand in it.
const NAME_HEIGHT: f32 = 8.0;
/// Below the scale, for what grey means.
const KEY_HEIGHT: f32 = BAR_WIDTH + 2.0 * GAP;

impl Matrix {
    /// Rows and columns that there are numbers for.
    pub(crate) fn shape(&self) -> (usize, usize) {
        let n_whole = self.values.len().checked_div(self.n_cols).unwrap_or(0);
        let n_rows = self.n_rows.min(n_whole);
        (n_rows, if n_rows == 0 { 0 } else { self.n_cols })
    }

    /// The rows, as long as they are complete.
    pub(crate) fn rows(&self) -> impl Iterator<Item = &[f32]> {
        let n_rows = self.shape().0;
        self.values.chunks(self.n_cols.max(1)).take(n_rows)
    }

    pub(crate) fn at(&self, row: usize, col: usize) -> f32 {
        self.values[row * self.n_cols + col]
    }

    /// With at most so many rows and columns, by the means of neighbours.
    fn shrunk(&self, max: usize) -> Matrix {
        let (n_rows, n_cols) = self.shape();
        let (rows, cols) = (n_rows.min(max), n_cols.min(max));
        if (rows, cols) == (n_rows, n_cols) {
            return self.clone();
        }
        let block = |index: usize, n: usize, of: usize| index * of / n..(index + 1) * of / n;
        let mut values = Vec::with_capacity(rows * cols);
        for row in 0..rows {
            for col in 0..cols {
                let (mut sum, mut count) = (0.0, 0.0);
                for r in block(row, rows, n_rows) {
                    for c in block(col, cols, n_cols) {
                        sum += self.at(r, c);
                        count += 1.0;
                    }
                }
                values.push(sum / count);
            }
        }
        Matrix {
            n_rows: rows,
            n_cols: cols,
            values,
        }
    }

    /// Smallest and largest finite number.
    fn range(&self) -> Option<(f32, f32)> {
        let finite = self.rows().flatten().filter(|value| value.is_finite());
        let (low, high) = finite.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &value| {
            (low.min(value), high.max(value))
        });
        (low <= high).then_some((low, high))
    }
}

/// Which number has which colour.
#[derive(Clone, Copy)]
struct Shades {
    low: f32,
    high: f32,
}

impl Shades {
    fn new(wanted: Option<(f32, f32)>, found: Option<(f32, f32)>) -> Self {
        let wanted = wanted.filter(|(low, high)| low.is_finite() && high.is_finite());
        let (low, high) = wanted.or(found).unwrap_or((0.0, 1.0));
        Self {
            low: low.min(high),
            high: high.max(low),
        }
    }

    /// 0 for the first colour and 1 for the last; all colours are the middle one where all numbers are the same.
    fn place(self, value: f32) -> f32 {
        // In 64 bits, because the difference of two 32-bit floats may be infinite.
        let [low, high, value] = [self.low, self.high, value].map(f64::from);
        if value.is_nan() {
            f32::NAN
        } else if high > low {
            #[expect(clippy::cast_possible_truncation, reason = "an infinity stays one")]
            let place = ((value - low) / (high - low)) as f32;
            place
        } else {
            0.5
        }
    }

    /// Draws the scale beside the cells, its name above, and below it what grey means.
    fn draw(self, drawing: &mut Drawing, area: &Area, (name, missing): (&str, &str)) {
        let left = area.right() + 2.0 * GAP;
        let height = bar_height(area.height, (name, missing));
        let above = if name.is_empty() { 0.0 } else { NAME_HEIGHT };
        let bar = Area {
            left,
            top: area.top + above,
            width: BAR_WIDTH,
            height,
        };
        let shades = (0..128u8).rev().map(|step| heat(f32::from(step) / 127.0).0);
        let pixels = Pixels {
            width: 1,
            height: 128,
            rgb: shades.flatten().collect(),
        };
        drawing.shapes.push(Shape::Pixels { area: bar, pixels });
        for tick in self.ticks(bar.height) {
            let (x, y) = bar.at(1.0, tick.at);
            drawing.line(vec![(x, y), (x + 3.0, y)], INK, 1.0);
            drawing.text(axes::label(
                x + GAP,
                y + SIZE * 0.36,
                &tick.label,
                Anchor::Start,
            ));
        }
        if !missing.is_empty() {
            let swatch = Area {
                left,
                top: area.bottom() - BAR_WIDTH,
                width: BAR_WIDTH,
                height: BAR_WIDTH,
            };
            drawing.fill(swatch, MISSING);
            let (x, y) = (swatch.right() + GAP, swatch.bottom() - 2.0);
            drawing.text(axes::label(x, y, missing, Anchor::Start));
        }
        let right = drawing.width - MARGIN;
        let name = axes::one_line(name, right - MARGIN);
        drawing.text(axes::label(right, area.top - 5.0, &name, Anchor::End));
    }

    fn ticks(self, height: f32) -> Vec<Tick> {
        let ends = [self.low, self.high].map(f64::from);
        let limits = (ends[0] < ends[1]).then_some((ends[0], ends[1]));
        let span = Span::new(Scale::Linear, limits, ends.into_iter(), 0.0);
        span.ticks(if height < 100.0 { 2 } else { 5 })
    }

    /// Room that the scale needs beside the cells.
    fn width(self, height: f32, said: (&str, &str)) -> f32 {
        let ticks = self.ticks(bar_height(height, said));
        let texts = ticks.iter().map(|tick| &*tick.label).chain([said.1]);
        let widths = texts.map(|text| font::width(text, SIZE));
        widths.fold(0.0, f32::max) + 2.0 * GAP + BAR_WIDTH + GAP + MARGIN
    }
}

/// Of the scale, where `height` is that of the cells, and its name and what grey means are said, too.
fn bar_height(height: f32, (name, missing): (&str, &str)) -> f32 {
    let above = if name.is_empty() { 0.0 } else { NAME_HEIGHT };
    let below = if missing.is_empty() { 0.0 } else { KEY_HEIGHT };
    height - above - below
}

/// A matrix with its scale.
pub(crate) fn heatmap(chart: &Heatmap, title: &str) -> Drawing {
    draw(chart, title).0
}

/// Returns also where the cells are.
fn draw(chart: &Heatmap, title: &str) -> (Drawing, Area) {
    let (n_rows, n_cols) = chart.matrix.shape();
    let shades = Shades::new(chart.range, chart.matrix.range());
    let shows_values = chart.shows_values && n_rows * n_cols <= MAX_NUMBERS;
    let (width, height) = cells_size(n_rows, n_cols, shows_values);
    let x = Side::across(&chart.x.label, &chart.x.names, n_cols, width);
    let y = Side::down(&chart.y.label, &chart.y.names, n_rows, height);
    let has_gaps = chart.matrix.rows().flatten().any(|value| value.is_nan());
    let missing = if has_gaps { &*chart.missing } else { "" };
    let missing = axes::one_line(missing, MAX_WIDTH);
    let said = (&*chart.scale, &*missing);
    let right = shades.width(height, said);
    let (mut drawing, area) = axes::chart(title, (width, height), &x, &y, right);
    draw_cells(&mut drawing, &area, &chart.matrix, shades);
    if shows_values {
        write_values(&mut drawing, &area, &chart.matrix, shades);
    }
    for &(row, col) in chart
        .marks
        .iter()
        .filter(|mark| mark.0 < n_rows && mark.1 < n_cols)
    {
        let cell = cell(&area, (n_rows, n_cols), row, col);
        // Two lines, one of which stands out from any colour.
        drawing.frame(cell, INK, 3.0);
        drawing.frame(cell, WHITE, 1.5);
    }
    if n_rows == 0 {
        axes::say_empty(&mut drawing, &area);
    }
    shades.draw(&mut drawing, &area, said);
    axes::finish(&mut drawing, &area, &x, &y);
    (drawing, area)
}

/// Width and height of all cells: squares, unless there are many more columns than rows or the other way round.
fn cells_size(n_rows: usize, n_cols: usize, shows_values: bool) -> (f32, f32) {
    let (rows, cols) = (n_rows.max(1) as f32, n_cols.max(1) as f32);
    let (mut width, mut height) = (
        (MAX_WIDTH / cols).min(MAX_CELL),
        (MAX_HEIGHT / rows).min(MAX_CELL),
    );
    if (1.0 / 4.0..4.0).contains(&(width / height)) {
        width = width.min(height);
        height = width;
    }
    if shows_values {
        (width, height) = (width.max(40.0), height.max(24.0));
    }
    let (width, height) = (
        width.max(MIN_CELL.min(2048.0 / cols)),
        height.max(MIN_CELL.min(2048.0 / rows)),
    );
    ((width * cols).max(60.0), (height * rows).max(60.0))
}

fn cell(area: &Area, (n_rows, n_cols): (usize, usize), row: usize, col: usize) -> Area {
    let (width, height) = (area.width / n_cols as f32, area.height / n_rows as f32);
    Area {
        left: area.left + col as f32 * width,
        top: area.top + row as f32 * height,
        width,
        height,
    }
}

fn draw_cells(drawing: &mut Drawing, area: &Area, matrix: &Matrix, shades: Shades) {
    let shape = matrix.shape();
    if shape.0 * shape.1 <= MAX_BOXES {
        for (row, values) in matrix.rows().enumerate() {
            for (col, &value) in values.iter().enumerate() {
                let mut cell = cell(area, shape, row, col);
                // Neighbours overlap, or paper would shine through between them.
                cell.width = (cell.width + 0.5).min(area.right() - cell.left);
                cell.height = (cell.height + 0.5).min(area.bottom() - cell.top);
                drawing.fill(cell, heat(shades.place(value)));
            }
        }
        return;
    }
    drawing.shapes.push(Shape::Pixels {
        area: *area,
        pixels: pixels(matrix, shades),
    });
}

fn pixels(matrix: &Matrix, shades: Shades) -> Pixels {
    let matrix = matrix.shrunk(MAX_PIXELS);
    let (n_rows, n_cols) = matrix.shape();
    let side = |n| u32::try_from(n).unwrap_or_default();
    let colors = matrix
        .rows()
        .flatten()
        .flat_map(|&value| heat(shades.place(value)).0);
    Pixels {
        width: side(n_cols),
        height: side(n_rows),
        rgb: colors.collect(),
    }
}

fn write_values(drawing: &mut Drawing, area: &Area, matrix: &Matrix, shades: Shades) {
    for (row, values) in matrix.rows().enumerate() {
        for (col, &value) in values.iter().enumerate() {
            let cell = cell(area, matrix.shape(), row, col);
            let (x, y) = cell.at(0.5, 0.5);
            let text = if value.abs() < 100.0 {
                format!("{value:.2}")
            } else if value.abs() < 1e5 {
                format!("{value:.0}")
            } else {
                format!("{value:.0e}")
            };
            let mut text = axes::label(x, y + SIZE * 0.36, &text, Anchor::Middle);
            text.fill = heat(shades.place(value)).contrast();
            drawing.text(text);
        }
    }
}

/// The chart of a confusion matrix: the share of each true class that was taken for each class.
pub(crate) fn of_confusion(confusion: &Confusion) -> Heatmap {
    let axis = |label: &str| Axis {
        label: label.to_owned(),
        names: confusion.names.clone(),
        ..Axis::default()
    };
    let shares = confusion.counts.rows().flat_map(|row| {
        let sum: f32 = row.iter().sum();
        // A class that never occurs has no shares.
        row.iter().map(move |count| count / sum)
    });
    let (n_rows, n_cols) = confusion.counts.shape();
    Heatmap {
        matrix: Matrix {
            n_rows,
            n_cols,
            values: shares.collect(),
        },
        x: axis("predicted"),
        y: axis("true"),
        range: Some((0.0, 1.0)),
        shows_values: true,
        ..Heatmap::default()
    }
}

/// The chart of a cluster map, and the first place and the length of each cluster in it.
pub(crate) fn of_clustermap(map: &Clustermap) -> (Heatmap, Vec<(usize, usize)>) {
    let n = map.matrix.shape().0.min(map.matrix.shape().1);
    let (order, lengths) = cluster::order(&map.matrix, n);
    let values = order
        .iter()
        .flat_map(|&row| order.iter().map(move |&col| map.matrix.at(row, col)));
    let name = |&index: &usize| {
        map.names
            .get(index)
            .cloned()
            .unwrap_or_else(|| index.to_string())
    };
    let names: Vec<String> = order.iter().map(name).collect();
    let axis = Axis {
        names,
        ..Axis::default()
    };
    let clusters = lengths.iter().scan(0, |next, &length| {
        let first = *next;
        *next += length;
        Some((first, length))
    });
    let heatmap = Heatmap {
        matrix: Matrix {
            n_rows: n,
            n_cols: n,
            values: values.collect(),
        },
        x: axis.clone(),
        y: axis,
        ..Heatmap::default()
    };
    (heatmap, clusters.collect())
}

/// Like things side by side, each cluster in a white box.
pub(crate) fn clustermap(map: &Clustermap, title: &str) -> Drawing {
    let (chart, clusters) = of_clustermap(map);
    let (mut drawing, area) = draw(&chart, title);
    let n = chart.matrix.n_rows;
    for (first, length) in clusters {
        let first = cell(&area, (n, n), first, first);
        drawing.frame(
            Area {
                width: first.width * length as f32,
                height: first.height * length as f32,
                ..first
            },
            WHITE,
            1.5,
        );
    }
    drawing
}

/// The frames as heat maps with one scale.
pub(crate) fn of_frames(frames: &Frames) -> impl Iterator<Item = (&str, Heatmap)> {
    let range = frames_range(frames);
    frames.frames.iter().map(move |(name, matrix)| {
        let heatmap = Heatmap {
            matrix: matrix.clone(),
            x: frames.x.clone(),
            y: frames.y.clone(),
            range: Some(range),
            ..Heatmap::default()
        };
        (name.as_str(), heatmap)
    })
}

fn frames_range(frames: &Frames) -> (f32, f32) {
    let found = frames
        .frames
        .iter()
        .filter_map(|(_, matrix)| matrix.range());
    let found = found.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
    let shades = Shades::new(frames.range, found);
    (shades.low, shades.high)
}

/// Frames beside each other, for where nothing moves; of many, a few at equal distances and the last.
pub(crate) fn stills(frames: &Frames, title: &str) -> Drawing {
    const SIDE: f32 = 150.0;
    let n = frames.frames.len();
    let n_shown = n.min(MAX_STILLS);
    let last = n_shown.saturating_sub(1).max(1);
    let shown: Vec<usize> = (0..n_shown).map(|index| index * (n - 1) / last).collect();
    let n_cols = shown.len().clamp(1, 4);
    let n_rows = shown.len().div_ceil(n_cols).max(1);
    let range = frames_range(frames);
    let shades = Shades::new(Some(range), None);
    let (step_x, step_y) = (SIDE + 2.0 * GAP, SIDE + LINE_HEIGHT + GAP);
    let all = Area {
        left: MARGIN,
        top: MARGIN + 24.0,
        width: n_cols as f32 * step_x - 2.0 * GAP,
        height: n_rows as f32 * step_y - GAP,
    };
    let mut drawing = Drawing {
        width: all.right() + shades.width(all.height, ("", "")),
        height: all.bottom() + MARGIN,
        shapes: Vec::new(),
    };
    write_title(&mut drawing, title);
    for (place, (name, matrix)) in shown.iter().map(|&index| &frames.frames[index]).enumerate() {
        let area = Area {
            left: all.left + (place % n_cols) as f32 * step_x,
            top: all.top + (place / n_cols) as f32 * step_y + LINE_HEIGHT,
            width: SIDE,
            height: SIDE,
        };
        let name = axes::one_line(name, SIDE);
        drawing.text(axes::label(area.left, area.top - 4.0, &name, Anchor::Start));
        drawing.shapes.push(Shape::Pixels {
            area,
            pixels: pixels(matrix, shades),
        });
    }
    if shown.is_empty() {
        axes::say_empty(&mut drawing, &all);
    }
    shades.draw(&mut drawing, &all, ("", ""));
    drawing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(n_rows: usize, n_cols: usize) -> Matrix {
        let values = (0..n_rows * n_cols).map(|index| index as f32).collect();
        Matrix {
            n_rows,
            n_cols,
            values,
        }
    }

    fn n_boxes(drawing: &Drawing) -> usize {
        let boxes = drawing
            .shapes
            .iter()
            .filter(|shape| matches!(shape, Shape::Box { .. }));
        boxes.count()
    }

    #[test]
    fn small_matrices_are_boxes_and_large_ones_one_picture() {
        let drawing = |n_rows, n_cols| {
            let chart = Heatmap {
                matrix: matrix(n_rows, n_cols),
                ..Heatmap::default()
            };
            heatmap(&chart, "")
        };
        assert_eq!(n_boxes(&drawing(18, 18)), 18 * 18);
        assert_eq!(n_boxes(&drawing(18, 565)), 0);
    }

    #[test]
    fn grey_is_explained_where_there_is_some() {
        let texts = |values: Vec<f32>| {
            let chart = Heatmap {
                matrix: Matrix {
                    n_rows: 2,
                    n_cols: 2,
                    values,
                },
                scale: "share".to_owned(),
                missing: "never".to_owned(),
                ..Heatmap::default()
            };
            let drawing = heatmap(&chart, "");
            let right = drawing.width;
            let texts = drawing.shapes.into_iter().filter_map(|shape| match shape {
                Shape::Text(text) => Some(text),
                _ => None,
            });
            let texts: Vec<_> = texts.collect();
            for text in texts.iter().filter(|text| text.anchor == Anchor::Start) {
                let end = text.x + font::width(&text.content, SIZE);
                assert!(end <= right, "`{}` ends at {end} of {right}", text.content);
            }
            texts
                .into_iter()
                .map(|text| text.content)
                .collect::<Vec<_>>()
        };
        let has = |texts: &[String], text: &str| texts.iter().any(|other| other == text);
        let with_gap = texts(vec![0.0, f32::NAN, 0.5, 1.0]);
        assert!(
            has(&with_gap, "never") && has(&with_gap, "share"),
            "{with_gap:?}"
        );
        assert!(!has(&texts(vec![0.0, 0.25, 0.5, 1.0]), "never"));
    }

    #[test]
    fn a_large_matrix_is_shown_by_the_means_of_its_blocks() {
        let small = matrix(4, 6).shrunk(2);
        assert_eq!(small.shape(), (2, 2));
        assert_eq!(small.values, [4.0, 7.0, 16.0, 19.0]);
    }

    #[test]
    fn a_matrix_that_lacks_numbers_has_its_whole_rows() {
        let mut short = matrix(3, 4);
        short.values.pop();
        assert_eq!(short.shape(), (2, 4));
        short.n_cols = 0;
        assert_eq!(short.shape(), (0, 0));
    }

    #[test]
    fn confusion_is_shown_as_shares_of_the_true_class() {
        let confusion = Confusion {
            counts: Matrix {
                n_rows: 2,
                n_cols: 2,
                values: vec![3.0, 1.0, 0.0, 0.0],
            },
            names: Vec::new(),
        };
        let values = of_confusion(&confusion).matrix.values;
        assert_eq!(values[..2], [0.75, 0.25]);
        assert!(values[2].is_nan() && values[3].is_nan());
    }

    #[test]
    fn like_things_become_neighbours_in_one_cluster() {
        let alike = |a: usize, b: usize| if a % 2 == b % 2 { 1.0 } else { 0.1 };
        let values = (0..6).flat_map(|a| (0..6).map(move |b| alike(a, b)));
        let map = Clustermap {
            matrix: Matrix {
                n_rows: 6,
                n_cols: 6,
                values: values.collect(),
            },
            names: Vec::new(),
        };
        let (chart, clusters) = of_clustermap(&map);
        assert_eq!(clusters, [(0, 3), (3, 3)]);
        assert_eq!(chart.x.names, ["0", "2", "4", "1", "3", "5"]);
        assert_eq!(chart.matrix.values[..6], [1.0, 1.0, 1.0, 0.1, 0.1, 0.1]);
    }

    #[test]
    fn infinite_numbers_have_the_colours_at_the_ends() {
        let shades = Shades::new(None, Some((-f32::MAX, f32::MAX)));
        assert!((shades.place(0.0) - 0.5).abs() < 1e-6);
        assert_eq!(heat(shades.place(f32::INFINITY)), heat(1.0));
        assert_eq!(heat(shades.place(f32::NEG_INFINITY)), heat(0.0));
    }
}
