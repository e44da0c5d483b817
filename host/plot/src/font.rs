//! The one font: `DejaVu Sans`, part of the program, so that pictures are the same on every machine.
//!
//! Glyphs are set one after the other by their widths. There is no shaping: labels are short, and scripts that need it
//! are rare in them. What the font lacks is a box.

use std::sync::LazyLock;
use tiny_skia::{Path, PathBuilder};
use ttf_parser::{Face, GlyphId, OutlineBuilder};

/// Families for viewers of an SVG; those after the first are about as wide.
pub(crate) const FAMILIES: &str = "DejaVu Sans, Verdana, Geneva, sans-serif";

static FACE: LazyLock<Option<Face<'static>>> =
    LazyLock::new(|| Face::parse(dejavu::sans::regular(), 0).ok());

/// Width of a text of a font size.
pub(crate) fn width(text: &str, size: f32) -> f32 {
    let Some(face) = &*FACE else { return 0.0 };
    let units: u32 = text.chars().map(|c| u32::from(advance(face, c))).sum();
    units as f32 * size / f32::from(face.units_per_em())
}

fn advance(face: &Face, c: char) -> u16 {
    face.glyph_hor_advance(glyph(face, c)).unwrap_or_default()
}

fn glyph(face: &Face, c: char) -> GlyphId {
    face.glyph_index(c).unwrap_or_default()
}

/// The text, or as much of its beginning as fits with `…` into `max_width`.
pub(crate) fn fit(text: &str, size: f32, max_width: f32) -> String {
    if width(text, size) <= max_width {
        return text.to_owned();
    }
    let mut left = max_width - width("…", size);
    let kept = text.chars().take_while(|&c| {
        left -= width(c.encode_utf8(&mut [0; 4]), size);
        left >= 0.0
    });
    kept.chain(['…']).collect()
}

/// The outline of a text whose baseline begins at the origin; nothing if it is blank.
pub(crate) fn outline(text: &str, size: f32) -> Option<Path> {
    let face = FACE.as_ref()?;
    let mut pen = Pen {
        path: PathBuilder::new(),
        x: 0.0,
        scale: size / f32::from(face.units_per_em()),
    };
    for c in text.chars() {
        face.outline_glyph(glyph(face, c), &mut pen);
        pen.x += f32::from(advance(face, c)) * pen.scale;
    }
    pen.path.finish()
}

/// Draws glyphs, whose coordinates are in font units and grow upwards.
struct Pen {
    path: PathBuilder,
    /// Where the glyph begins.
    x: f32,
    scale: f32,
}

impl Pen {
    fn at(&self, x: f32, y: f32) -> (f32, f32) {
        (self.x + x * self.scale, -y * self.scale)
    }
}

impl OutlineBuilder for Pen {
    fn move_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.path.move_to(x, y);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.path.line_to(x, y);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        let ((x1, y1), (x, y)) = (self.at(x1, y1), self.at(x, y));
        self.path.quad_to(x1, y1, x, y);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        let ((x1, y1), (x2, y2), (x, y)) = (self.at(x1, y1), self.at(x2, y2), self.at(x, y));
        self.path.cubic_to(x1, y1, x2, y2, x, y);
    }

    fn close(&mut self) {
        self.path.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_font_has_what_labels_need() {
        let face = FACE.as_ref().unwrap();
        for c in "0aÄßµσπ×≤→∞…▁⁻⁰¹²³⁴⁵⁶⁷⁸⁹Жλ".chars() {
            assert!(face.glyph_index(c).is_some(), "{c}");
        }
    }

    #[test]
    fn width_grows_with_text_and_size() {
        assert!(width("", 12.0).abs() < f32::EPSILON);
        assert!(width("mm", 12.0) > width("ii", 12.0));
        assert!((width("label", 24.0) - 2.0 * width("label", 12.0)).abs() < 1e-3);
        assert!(width("専門家", 12.0) > 0.0);
    }

    #[test]
    fn what_does_not_fit_is_cut() {
        assert_eq!(fit("short", 12.0, 100.0), "short");
        let cut = fit("a rather long name", 12.0, 60.0);
        assert!(cut.starts_with("a r") && cut.ends_with('…'), "{cut}");
        assert!(width(&cut, 12.0) <= 60.0);
        assert_eq!(fit("name", 12.0, 0.0), "…");
    }
}
