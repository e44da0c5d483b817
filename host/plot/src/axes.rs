//! What stands around the data of a chart: title, ticks, names, legend. Margins are as wide as the text in them.

use crate::color::{GRID, INK, LINE};
use crate::drawing::{Anchor, Area, Drawing, Text};
use crate::font;
use crate::ticks::{Span, Tick, every};

/// Size of all text but the title's.
pub(crate) const SIZE: f32 = 11.0;
const TITLE_SIZE: f32 = 13.0;
/// Between things that are near each other.
pub(crate) const GAP: f32 = 6.0;
/// Around the picture.
pub(crate) const MARGIN: f32 = 10.0;
/// Longest name at a tick or in a legend; the rest of it is cut.
const MAX_NAME: f32 = 160.0;
/// From one line of text to the next.
pub(crate) const LINE_HEIGHT: f32 = 15.0;

/// One side of a chart.
#[derive(Debug, Default)]
pub(crate) struct Side {
    pub(crate) label: String,
    pub(crate) ticks: Vec<Tick>,
    /// Names stand slanted because they are too long to stand side by side.
    is_slanted: bool,
    has_grid: bool,
}

impl Side {
    /// An axis of numbers.
    pub(crate) fn of_span(label: &str, span: &Span, n_ticks: usize) -> Self {
        Self {
            label: label.to_owned(),
            ticks: span.ticks(n_ticks),
            is_slanted: false,
            has_grid: true,
        }
    }

    /// An axis of `n` places to the right, `length` long.
    pub(crate) fn across(label: &str, names: &[String], n: usize, length: f32) -> Self {
        let slot = length / n.max(1) as f32;
        let widest = widest(names, n);
        let is_slanted = !names.is_empty() && widest + GAP > slot;
        let needed = if is_slanted {
            LINE_HEIGHT
        } else {
            widest + 2.0 * GAP
        };
        Self {
            label: label.to_owned(),
            ticks: places(names, n, every(needed / slot), false),
            is_slanted,
            has_grid: false,
        }
    }

    /// An axis of `n` places, `length` long, from the top down.
    pub(crate) fn down(label: &str, names: &[String], n: usize, length: f32) -> Self {
        let slot = length / n.max(1) as f32;
        Self {
            label: label.to_owned(),
            ticks: places(names, n, every((SIZE + 2.0) / slot), true),
            is_slanted: false,
            has_grid: false,
        }
    }

    fn widest(&self) -> f32 {
        let widths = self.ticks.iter().map(|tick| font::width(&tick.label, SIZE));
        widths.fold(0.0, f32::max)
    }
}

fn widest(names: &[String], n: usize) -> f32 {
    if names.is_empty() {
        return font::width(&n.saturating_sub(1).to_string(), SIZE);
    }
    let widths = names.iter().take(n).map(|name| font::width(name, SIZE));
    widths.fold(0.0, f32::max).min(MAX_NAME)
}

/// The middles of `n` places, every few of them.
fn places(names: &[String], n: usize, every: usize, from_top: bool) -> Vec<Tick> {
    let tick = |index: usize| {
        let at = (index as f64 + 0.5) / n as f64;
        let label = match names.get(index) {
            Some(name) => one_line(name, MAX_NAME),
            None if names.is_empty() => index.to_string(),
            None => String::new(),
        };
        Tick {
            at: if from_top { 1.0 - at } else { at },
            label,
        }
    };
    (0..n).step_by(every.max(1)).map(tick).collect()
}

/// A text without line breaks and tabs, cut where it is too wide.
pub(crate) fn one_line(text: &str, max_width: f32) -> String {
    // No name of a thousand letters fits anywhere.
    let text: String = text.chars().take(1000).collect();
    let line = text.replace(char::is_control, " ");
    font::fit(&line, SIZE, max_width)
}

/// An empty chart whose data have an area of the given size, with `right` free beside it.
pub(crate) fn chart(
    title: &str,
    (width, height): (f32, f32),
    x: &Side,
    y: &Side,
    right: f32,
) -> (Drawing, Area) {
    let y_label = if y.label.is_empty() {
        0.0
    } else {
        LINE_HEIGHT + GAP
    };
    let mut left = MARGIN + y_label + y.widest() + GAP;
    if x.is_slanted {
        // The first names reach to the left of their ticks.
        let overhang = x.ticks.iter().map(|tick| {
            let (at, _) = Area {
                width,
                ..Area::default()
            }
            .at(tick.at, 0.0);
            font::width(&tick.label, SIZE) * SLANT - at
        });
        left = left.max(MARGIN + overhang.fold(0.0, f32::max));
    }
    let right = right.max(MARGIN + font::width("00", SIZE));
    let names = if x.is_slanted {
        x.widest() * SLANT + GAP
    } else {
        0.0
    };
    let x_label = if x.label.is_empty() {
        0.0
    } else {
        LINE_HEIGHT + 2.0
    };
    let top = if title.is_empty() {
        MARGIN + GAP
    } else {
        MARGIN + 24.0
    };
    let area = Area {
        left,
        top,
        width,
        height,
    };
    let mut drawing = Drawing {
        width: left + width + right,
        height: top + height + LINE_HEIGHT + names + x_label + MARGIN,
        shapes: Vec::new(),
    };
    write_title(&mut drawing, title);
    grid(&mut drawing, &area, x, y);
    (drawing, area)
}

/// Sine and cosine of 45°.
const SLANT: f32 = std::f32::consts::FRAC_1_SQRT_2;

/// Writes a title over the whole width.
pub(crate) fn write_title(drawing: &mut Drawing, title: &str) {
    let room = (drawing.width - 2.0 * MARGIN) * SIZE / TITLE_SIZE;
    drawing.text(Text {
        x: MARGIN,
        y: MARGIN + TITLE_SIZE,
        content: one_line(title, room),
        size: TITLE_SIZE,
        anchor: Anchor::Start,
        turn: 0.0,
        fill: INK,
    });
}

fn grid(drawing: &mut Drawing, area: &Area, x: &Side, y: &Side) {
    let named = |side: &Side| {
        let ticks = side
            .ticks
            .iter()
            .filter(|tick| side.has_grid && !tick.label.is_empty());
        ticks.map(|tick| tick.at).collect::<Vec<_>>()
    };
    for at in named(x) {
        drawing.line(vec![area.at(at, 0.0), area.at(at, 1.0)], GRID, 1.0);
    }
    for at in named(y) {
        drawing.line(vec![area.at(0.0, at), area.at(1.0, at)], GRID, 1.0);
    }
}

/// Draws axes, ticks and their labels, over the data.
pub(crate) fn finish(drawing: &mut Drawing, area: &Area, x: &Side, y: &Side) {
    let mut below = area.bottom() + LINE_HEIGHT + 2.0;
    for tick in &x.ticks {
        let (x_at, bottom) = area.at(tick.at, 0.0);
        let length = if tick.label.is_empty() { 2.0 } else { 4.0 };
        drawing.line(vec![(x_at, bottom), (x_at, bottom + length)], LINE, 1.0);
        let (anchor, turn, drop) = if x.is_slanted {
            (Anchor::End, -45.0, GAP + SIZE * 0.6)
        } else {
            (Anchor::Middle, 0.0, LINE_HEIGHT)
        };
        let shift = if x.is_slanted { SIZE * 0.3 } else { 0.0 };
        drawing.text(Text {
            turn,
            ..label(x_at + shift, bottom + drop, &tick.label, anchor)
        });
    }
    if x.is_slanted {
        below += x.widest() * SLANT + GAP;
    }
    for tick in &y.ticks {
        let (left, y_at) = area.at(0.0, tick.at);
        let length = if tick.label.is_empty() { 2.0 } else { 4.0 };
        drawing.line(vec![(left - length, y_at), (left, y_at)], LINE, 1.0);
        drawing.text(label(
            left - GAP,
            y_at + SIZE * 0.36,
            &tick.label,
            Anchor::End,
        ));
    }
    drawing.line(
        vec![area.at(0.0, 1.0), area.at(0.0, 0.0), area.at(1.0, 0.0)],
        LINE,
        1.0,
    );
    let (middle, _) = area.at(0.5, 0.0);
    let name = one_line(&x.label, area.width.max(80.0));
    drawing.text(label(middle, below + SIZE, &name, Anchor::Middle));
    let (_, middle) = area.at(0.0, 0.5);
    let name = one_line(&y.label, area.height.max(80.0));
    drawing.text(Text {
        turn: -90.0,
        ..label(MARGIN + SIZE * 0.8, middle, &name, Anchor::Middle)
    });
}

/// Text of the usual size.
pub(crate) fn label(x: f32, y: f32, text: &str, anchor: Anchor) -> Text {
    Text {
        x,
        y,
        content: text.to_owned(),
        size: SIZE,
        anchor,
        turn: 0.0,
        fill: INK,
    }
}

/// Says that there is nothing to see, so that an empty chart is not taken for a broken one.
pub(crate) fn say_empty(drawing: &mut Drawing, area: &Area) {
    let (x, y) = area.at(0.5, 0.5);
    let mut text = label(x, y, "no data", Anchor::Middle);
    text.fill = LINE;
    drawing.text(text);
}
