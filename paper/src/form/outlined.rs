//! SVG whose letters are shapes, so that it looks the same where the font is not installed.

use super::font;
use super::picture::{Text, Unreadable, text};
use roxmltree::{Document, Node};
use std::fmt::Write;
use ttf_parser::{Face, OutlineBuilder};

/// The document with a path in place of each text; what the text says is its `aria-label`.
pub(crate) fn outlined(svg: &str) -> Result<String, Unreadable> {
    let document = Document::parse(svg)?;
    let face = font::face()?;
    let mut out = String::new();
    let mut done = 0;
    let texts = document
        .descendants()
        .filter(|node: &Node| node.tag_name().name() == "text");
    for node in texts {
        let range = node.range();
        out.push_str(&svg[done..range.start]);
        let fill = node.attribute("fill").unwrap_or("#000000");
        // As it stands in the source, with its markup escaped.
        let source = &svg[range.clone()];
        let label = source
            .trim_end_matches("</text>")
            .rsplit_once('>')
            .map_or("", |(_, label)| label);
        let _ = write!(
            out,
            "<path aria-label=\"{}\" fill=\"{fill}\" d=\"{}\"/>",
            label.replace('"', "&quot;"),
            path(&face, &text(node)?)
        );
        done = range.end;
    }
    out.push_str(&svg[done..]);
    Ok(out)
}

fn path(face: &Face, text: &Text) -> String {
    let (sin, cos) = text.turn.to_radians().sin_cos();
    let mut pen = Pen {
        path: String::new(),
        place: (text.x, text.y),
        turn: (sin, cos),
        x: -font::offset(face, text),
        scale: text.size / f32::from(face.units_per_em()),
    };
    for c in text.content.chars() {
        let glyph = font::glyph(face, c);
        face.outline_glyph(glyph, &mut pen);
        pen.x += font::advance(face, glyph) * pen.scale;
    }
    pen.path
}

/// Writes glyphs, whose coordinates are in units of the font and grow upwards.
struct Pen {
    path: String,
    /// Where the text stands.
    place: (f32, f32),
    /// Sine and cosine of its direction.
    turn: (f32, f32),
    /// Where the glyph begins along the text.
    x: f32,
    scale: f32,
}

impl Pen {
    fn push(&mut self, command: char, points: &[(f32, f32)]) {
        self.path.push(command);
        let (sin, cos) = self.turn;
        for (index, &(x, y)) in points.iter().enumerate() {
            let (x, y) = (self.x + x * self.scale, -y * self.scale);
            let (x, y) = (
                self.place.0 + x * cos - y * sin,
                self.place.1 + x * sin + y * cos,
            );
            let space = if index == 0 { "" } else { " " };
            let _ = write!(self.path, "{space}{x:.2} {y:.2}");
        }
    }
}

impl OutlineBuilder for Pen {
    fn move_to(&mut self, x: f32, y: f32) {
        self.push('M', &[(x, y)]);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        self.push('L', &[(x, y)]);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        self.push('Q', &[(x1, y1), (x, y)]);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        self.push('C', &[(x1, y1), (x2, y2), (x, y)]);
    }

    fn close(&mut self) {
        self.path.push('Z');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_become_shapes_where_they_stood() {
        let svg = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"40\" height=\"20\">\n\
                   <rect x=\"0\" y=\"0\" width=\"40\" height=\"20\" fill=\"#ffffff\"/>\n\
                   <text x=\"20\" y=\"10\" font-size=\"10\" fill=\"#112233\" text-anchor=\"end\">a&lt;I</text>\n</svg>\n";
        let out = outlined(svg).unwrap();
        assert!(!out.contains("<text"), "{out}");
        assert!(
            out.contains("<path aria-label=\"a&lt;I\" fill=\"#112233\" d=\"M"),
            "{out}"
        );
        assert!(out.starts_with(&svg[..svg.find("<text").unwrap()]));
        let document = Document::parse(&out).unwrap();
        let path = document
            .descendants()
            .find(|node| node.tag_name().name() == "path");
        let numbers: Vec<f32> = path
            .and_then(|path| path.attribute("d"))
            .unwrap()
            .split(|c: char| c.is_ascii_uppercase() || c == ' ')
            .filter_map(|word| word.parse().ok())
            .collect();
        let xs: Vec<f32> = numbers.iter().step_by(2).copied().collect();
        let ys: Vec<f32> = numbers.iter().skip(1).step_by(2).copied().collect();
        // It ends at x = 20, and stands on y = 10.
        assert!(xs.iter().all(|x| (0.0..=20.0).contains(x)), "{xs:?}");
        assert!(ys.iter().all(|y| (1.0..=10.5).contains(y)), "{ys:?}");
    }
}
