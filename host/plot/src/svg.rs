//! A drawing as SVG. Text stays text; it can be selected, searched and set in another font.

use crate::color::{Color, WHITE};
use crate::drawing::{Anchor, Area, Drawing, Pixels, Shape, Text};
use crate::font;
use crate::raster::png;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::fmt::Write;

/// The whole document.
pub(crate) fn write(drawing: &Drawing) -> String {
    let (width, height) = (Number(drawing.width), Number(drawing.height));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"{}\">\n",
        font::FAMILIES
    );
    let paper = Area {
        width: drawing.width,
        height: drawing.height,
        ..Area::default()
    };
    push(&mut out, format_args!("<rect {paper} fill=\"{WHITE}\"/>"));
    for shape in &drawing.shapes {
        write_shape(&mut out, shape);
    }
    out.push_str("</svg>\n");
    out
}

fn push(out: &mut String, element: std::fmt::Arguments) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{element}");
}

fn write_shape(out: &mut String, shape: &Shape) {
    match shape {
        Shape::Box { area, fill } => push(out, format_args!("<rect {area} fill=\"{fill}\"/>")),
        Shape::Frame {
            area,
            stroke,
            width,
        } => push(
            out,
            format_args!(
                "<rect {area} fill=\"none\" stroke=\"{stroke}\" stroke-width=\"{}\"/>",
                Number(*width)
            ),
        ),
        Shape::Line {
            points,
            stroke,
            width,
        } => push(
            out,
            format_args!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{stroke}\" stroke-width=\"{}\" \
                 stroke-linejoin=\"round\"/>",
                Points(points),
                Number(*width)
            ),
        ),
        Shape::Band {
            points,
            fill,
            opacity,
        } => push(
            out,
            format_args!(
                "<polygon points=\"{}\" fill=\"{fill}\" fill-opacity=\"{}\"/>",
                Points(points),
                Number(*opacity)
            ),
        ),
        Shape::Dot { x, y, radius, fill } => push(
            out,
            format_args!(
                "<circle cx=\"{}\" cy=\"{}\" r=\"{}\" fill=\"{fill}\"/>",
                Number(*x),
                Number(*y),
                Number(*radius)
            ),
        ),
        Shape::Text(text) => write_text(out, text),
        Shape::Pixels { area, pixels } => write_pixels(out, area, pixels),
    }
}

fn write_text(out: &mut String, text: &Text) {
    let (x, y) = (Number(text.x), Number(text.y));
    let anchor = match text.anchor {
        Anchor::Start => "",
        Anchor::Middle => " text-anchor=\"middle\"",
        Anchor::End => " text-anchor=\"end\"",
    };
    let turn = if text.turn == 0.0 {
        String::new()
    } else {
        format!(" transform=\"rotate({} {x} {y})\"", Number(text.turn))
    };
    push(
        out,
        format_args!(
            "<text x=\"{x}\" y=\"{y}\" font-size=\"{}\" fill=\"{}\"{anchor}{turn}>{}</text>",
            Number(text.size),
            text.fill,
            escape(&text.content)
        ),
    );
}

/// One PNG instead of a rectangle per pixel: a tenth of the bytes, and quick to show.
fn write_pixels(out: &mut String, area: &Area, pixels: &Pixels) {
    let data = STANDARD.encode(png(pixels.width, pixels.height, &pixels.rgb));
    push(
        out,
        format_args!(
            "<image {area} preserveAspectRatio=\"none\" style=\"image-rendering:pixelated\" \
             href=\"data:image/png;base64,{data}\"/>"
        ),
    );
}

/// Text as XML takes it; control characters, which it does not, become U+FFFD.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// At most two decimals, which no eye and no printer can tell from more.
struct Number(f32);

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let text = format!("{:.2}", self.0);
        let short = text.trim_end_matches('0').trim_end_matches('.');
        f.write_str(if short == "-0" { "0" } else { short })
    }
}

struct Points<'a>(&'a [(f32, f32)]);

impl std::fmt::Display for Points<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        for (index, &(x, y)) in self.0.iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{},{}", Number(x), Number(y))?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Area {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(
            f,
            "x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"",
            Number(self.left),
            Number(self.top),
            Number(self.width),
            Number(self.height)
        )
    }
}

impl std::fmt::Display for Color {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let [red, green, blue] = self.0;
        write!(f, "#{red:02x}{green:02x}{blue:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let text = |number| Number(number).to_string();
        assert_eq!(text(10.0), "10");
        assert_eq!(text(0.126), "0.13");
        assert_eq!(text(-0.001), "0");
        assert_eq!(text(-7.5), "-7.5");
    }

    #[test]
    fn markup_and_control_characters_are_no_markup() {
        assert_eq!(
            escape("a<b>&\"c\u{7}\n"),
            "a&lt;b&gt;&amp;\"c\u{fffd}\u{fffd}"
        );
    }
}
