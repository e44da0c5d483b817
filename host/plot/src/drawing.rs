//! A picture as shapes: what charts are drawn as, before it is known whether it becomes text or pixels.

use crate::color::Color;

/// Shapes on white paper. Lengths are those of an SVG, about 1/96 inch, from the upper left corner.
#[derive(Debug, Default)]
pub(crate) struct Drawing {
    pub(crate) width: f32,
    pub(crate) height: f32,
    /// Later ones cover earlier ones.
    pub(crate) shapes: Vec<Shape>,
}

/// A rectangle.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Area {
    pub(crate) left: f32,
    pub(crate) top: f32,
    pub(crate) width: f32,
    pub(crate) height: f32,
}

/// Which point of a text its place is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// One shape.
#[derive(Debug)]
pub(crate) enum Shape {
    /// A filled rectangle.
    Box { area: Area, fill: Color },
    /// The border of a rectangle.
    Frame {
        area: Area,
        stroke: Color,
        width: f32,
    },
    /// Straight lines from point to point.
    Line {
        points: Vec<(f32, f32)>,
        stroke: Color,
        width: f32,
    },
    /// A filled polygon.
    Band {
        points: Vec<(f32, f32)>,
        fill: Color,
        opacity: f32,
    },
    /// A filled circle.
    Dot {
        x: f32,
        y: f32,
        radius: f32,
        fill: Color,
    },
    /// A line of text on its baseline.
    Text(Text),
    /// Pixels, each a rectangle of the same size.
    Pixels { area: Area, pixels: Pixels },
}

/// A line of text.
#[derive(Debug)]
pub(crate) struct Text {
    pub(crate) x: f32,
    pub(crate) y: f32,
    pub(crate) content: String,
    pub(crate) size: f32,
    pub(crate) anchor: Anchor,
    /// Degrees clockwise around its place.
    pub(crate) turn: f32,
    pub(crate) fill: Color,
}

/// Colours row by row.
#[derive(Debug)]
pub(crate) struct Pixels {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// Three bytes a pixel.
    pub(crate) rgb: Vec<u8>,
}

impl Area {
    pub(crate) fn right(&self) -> f32 {
        self.left + self.width
    }

    pub(crate) fn bottom(&self) -> f32 {
        self.top + self.height
    }

    /// The point at a share of width and height, from the lower left corner.
    pub(crate) fn at(&self, x: f64, y: f64) -> (f32, f32) {
        #[expect(clippy::cast_possible_truncation, reason = "a place on paper")]
        let (x, y) = (x as f32, y as f32);
        (self.left + x * self.width, self.bottom() - y * self.height)
    }

    /// The part of a line inside: Liang and Barsky's clipping.
    pub(crate) fn clip(
        &self,
        (x0, y0): (f32, f32),
        (x1, y1): (f32, f32),
    ) -> Option<((f32, f32), (f32, f32))> {
        let (dx, dy) = (x1 - x0, y1 - y0);
        let (mut from, mut to) = (0.0f32, 1.0f32);
        for (delta, room) in [
            (-dx, x0 - self.left),
            (dx, self.right() - x0),
            (-dy, y0 - self.top),
            (dy, self.bottom() - y0),
        ] {
            if delta == 0.0 {
                if room < 0.0 {
                    return None;
                }
            } else if delta < 0.0 {
                from = from.max(room / delta);
            } else {
                to = to.min(room / delta);
            }
        }
        let point = |t: f32| (x0 + t * dx, y0 + t * dy);
        (from <= to).then(|| (point(from), point(to)))
    }

    /// The point, or the nearest inside.
    pub(crate) fn clamp(&self, (x, y): (f32, f32)) -> (f32, f32) {
        (
            x.clamp(self.left, self.right()),
            y.clamp(self.top, self.bottom()),
        )
    }
}

impl Drawing {
    pub(crate) fn fill(&mut self, area: Area, fill: Color) {
        self.shapes.push(Shape::Box { area, fill });
    }

    pub(crate) fn frame(&mut self, area: Area, stroke: Color, width: f32) {
        self.shapes.push(Shape::Frame {
            area,
            stroke,
            width,
        });
    }

    pub(crate) fn line(&mut self, points: Vec<(f32, f32)>, stroke: Color, width: f32) {
        self.shapes.push(Shape::Line {
            points,
            stroke,
            width,
        });
    }

    pub(crate) fn text(&mut self, text: Text) {
        if !text.content.is_empty() {
            self.shapes.push(Shape::Text(text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_the_border() {
        let area = Area {
            left: 0.0,
            top: 0.0,
            width: 10.0,
            height: 10.0,
        };
        assert_eq!(
            area.clip((-5.0, 5.0), (15.0, 5.0)),
            Some(((0.0, 5.0), (10.0, 5.0)))
        );
        assert_eq!(
            area.clip((2.0, 2.0), (3.0, 4.0)),
            Some(((2.0, 2.0), (3.0, 4.0)))
        );
        assert_eq!(area.clip((-5.0, 1.0), (1.0, -5.0)), None);
        assert_eq!(area.clip((11.0, 0.0), (11.0, 9.0)), None);
    }
}
