//! The font of all figures, `DejaVu Sans`; charts are laid out with its widths.

use super::picture::{Anchor, Text};
use ttf_parser::{Face, FaceParsingError, GlyphId};

/// The font as a file.
pub(super) fn file() -> &'static [u8] {
    dejavu::sans::regular()
}

/// The font.
pub(super) fn face() -> Result<Face<'static>, FaceParsingError> {
    Face::parse(file(), 0)
}

/// The glyph of a character; what the font lacks is a box.
pub(super) fn glyph(face: &Face, c: char) -> GlyphId {
    face.glyph_index(c).unwrap_or_default()
}

/// Width of a glyph in units of the font.
pub(super) fn advance(face: &Face, glyph: GlyphId) -> f32 {
    f32::from(face.glyph_hor_advance(glyph).unwrap_or_default())
}

/// How far to the left of its place a text begins.
pub(super) fn offset(face: &Face, text: &Text) -> f32 {
    let share = match text.anchor {
        Anchor::Start => return 0.0,
        Anchor::Middle => 0.5,
        Anchor::End => 1.0,
    };
    let width: f32 = text
        .content
        .chars()
        .map(|c| advance(face, glyph(face, c)))
        .sum();
    share * width * text.size / f32::from(face.units_per_em())
}
