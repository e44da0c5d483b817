//! A drawing as PDF, for papers. Text is outlines: there is no font that could be missing, or be of a type that a
//! publisher refuses.

use crate::color::Color;
use crate::drawing::{Anchor, Area, Drawing, Pixels, Shape, Text};
use crate::font;
use flate2::Compression;
use flate2::write::ZlibEncoder;
use std::fmt::Write as _;
use std::io::Write as _;
use tiny_skia::PathSegment;

/// Points, of which 72 are an inch, per unit, of which 96 are.
const SCALE: f32 = 0.75;
/// Numbers of the objects that every file has; pictures follow.
const N_FIXED: usize = 4;

/// The whole file, one page of the drawing's size.
pub(crate) fn write(drawing: &Drawing) -> Vec<u8> {
    let mut page = Page::default();
    let (width, height) = (drawing.width * SCALE, drawing.height * SCALE);
    // From here on units and directions are those of a drawing: y grows downwards.
    page.push(format_args!("{SCALE} 0 0 -{SCALE} 0 {height} cm 1 j"));
    for shape in &drawing.shapes {
        page.draw(shape);
    }

    let pictures =
        (0..page.pictures.len()).map(|index| format!("/I{index} {} 0 R ", N_FIXED + 1 + index));
    let states = page.opacities.iter().map(|percent| {
        let share = f32::from(*percent) / 100.0;
        format!("/O{percent} << /ca {share} >> ")
    });
    let resources = format!(
        "<< /XObject << {}>> /ExtGState << {}>> >>",
        pictures.collect::<String>(),
        states.collect::<String>()
    );
    let mut file = File::new();
    file.object(b"<< /Type /Catalog /Pages 2 0 R >>");
    file.object(b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>");
    let page_object = format!(
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] /Contents 4 0 R /Resources {resources} >>"
    );
    file.object(page_object.as_bytes());
    file.stream("", page.content.as_bytes());
    for pixels in page.pictures {
        let attributes = format!(
            "/Type /XObject /Subtype /Image /Width {} /Height {} /ColorSpace /DeviceRGB /BitsPerComponent 8 ",
            pixels.width, pixels.height
        );
        file.stream(&attributes, &pixels.rgb);
    }
    file.finish()
}

/// What is on the page, in PDF's drawing operators.
#[derive(Default)]
struct Page<'a> {
    content: String,
    pictures: Vec<&'a Pixels>,
    /// In percent.
    opacities: Vec<u8>,
}

impl<'a> Page<'a> {
    fn push(&mut self, operators: std::fmt::Arguments) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.content, "{operators}");
    }

    fn draw(&mut self, shape: &'a Shape) {
        match shape {
            Shape::Box { area, fill } => {
                self.push(format_args!("{} rg {} re f", Rgb(*fill), Rect(area)));
            }
            Shape::Frame {
                area,
                stroke,
                width,
            } => self.push(format_args!(
                "{} RG {width} w {} re S",
                Rgb(*stroke),
                Rect(area)
            )),
            Shape::Line {
                points,
                stroke,
                width,
            } => {
                self.push(format_args!("{} RG {width} w", Rgb(*stroke)));
                self.polygon(points, "S");
            }
            Shape::Band {
                points,
                fill,
                opacity,
            } => {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "clamped to percents"
                )]
                let percent = (opacity * 100.0).round().clamp(0.0, 100.0) as u8;
                if !self.opacities.contains(&percent) {
                    self.opacities.push(percent);
                }
                self.push(format_args!("q /O{percent} gs {} rg", Rgb(*fill)));
                self.polygon(points, "f");
                self.push(format_args!("Q"));
            }
            // A line without length and with round ends.
            Shape::Dot { x, y, radius, fill } => self.push(format_args!(
                "{} RG {} w 1 J {x} {y} m {x} {y} l S 0 J",
                Rgb(*fill),
                2.0 * radius
            )),
            Shape::Text(text) => self.text(text),
            Shape::Pixels { area, pixels } => {
                let index = self.pictures.len();
                self.pictures.push(pixels);
                self.push(format_args!(
                    "q {} 0 0 -{} {} {} cm /I{index} Do Q",
                    area.width,
                    area.height,
                    area.left,
                    area.bottom()
                ));
            }
        }
    }

    fn polygon(&mut self, points: &[(f32, f32)], paint: &str) {
        for (index, (x, y)) in points.iter().enumerate() {
            let operator = if index == 0 { "m" } else { "l" };
            self.push(format_args!("{x} {y} {operator}"));
        }
        if !points.is_empty() {
            self.push(format_args!("{paint}"));
        }
    }

    fn text(&mut self, text: &Text) {
        let Some(path) = font::outline(&text.content, text.size) else {
            return;
        };
        let width = font::width(&text.content, text.size);
        let shift = match text.anchor {
            Anchor::Start => 0.0,
            Anchor::Middle => -width / 2.0,
            Anchor::End => -width,
        };
        let (sin, cos) = text.turn.to_radians().sin_cos();
        self.push(format_args!(
            "q {} rg {cos:.4} {sin:.4} {:.4} {cos:.4} {} {} cm 1 0 0 1 {shift} 0 cm",
            Rgb(text.fill),
            -sin,
            text.x,
            text.y
        ));
        let mut at = (0.0, 0.0);
        for segment in path.segments() {
            match segment {
                PathSegment::MoveTo(to) => self.push(format_args!("{:.3} {:.3} m", to.x, to.y)),
                PathSegment::LineTo(to) => self.push(format_args!("{:.3} {:.3} l", to.x, to.y)),
                // PDF has curves with two control points only.
                PathSegment::QuadTo(by, to) => {
                    let third = |end: f32, by: f32| end + (by - end) * 2.0 / 3.0;
                    self.push(format_args!(
                        "{:.3} {:.3} {:.3} {:.3} {:.3} {:.3} c",
                        third(at.0, by.x),
                        third(at.1, by.y),
                        third(to.x, by.x),
                        third(to.y, by.y),
                        to.x,
                        to.y
                    ));
                }
                PathSegment::CubicTo(a, b, to) => self.push(format_args!(
                    "{:.3} {:.3} {:.3} {:.3} {:.3} {:.3} c",
                    a.x, a.y, b.x, b.y, to.x, to.y
                )),
                PathSegment::Close => self.push(format_args!("h")),
            }
            if let PathSegment::MoveTo(to)
            | PathSegment::LineTo(to)
            | PathSegment::QuadTo(_, to)
            | PathSegment::CubicTo(_, _, to) = segment
            {
                at = (to.x, to.y);
            }
        }
        self.push(format_args!("f Q"));
    }
}

struct Rgb(Color);

impl std::fmt::Display for Rgb {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let [red, green, blue] = self.0.0.map(|byte| f32::from(byte) / 255.0);
        write!(f, "{red:.3} {green:.3} {blue:.3}")
    }
}

struct Rect<'a>(&'a Area);

impl std::fmt::Display for Rect<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let area = self.0;
        write!(
            f,
            "{} {} {} {}",
            area.left, area.top, area.width, area.height
        )
    }
}

/// Objects one after the other, and where each begins.
struct File {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl File {
    fn new() -> Self {
        Self {
            // Four bytes beyond ASCII tell programs that this is no text.
            bytes: b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n".to_vec(),
            starts: Vec::new(),
        }
    }

    fn object(&mut self, body: &[u8]) {
        self.starts.push(self.bytes.len());
        let head = format!("{} 0 obj\n", self.starts.len());
        self.bytes.extend_from_slice(head.as_bytes());
        self.bytes.extend_from_slice(body);
        self.bytes.extend_from_slice(b"\nendobj\n");
    }

    fn stream(&mut self, attributes: &str, data: &[u8]) {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        let compressed = encoder.write_all(data).and_then(|()| encoder.finish());
        debug_assert!(compressed.is_ok(), "memory takes everything");
        let compressed = compressed.unwrap_or_default();
        let length = compressed.len();
        let head = format!("<< {attributes}/Filter /FlateDecode /Length {length} >>\nstream\n");
        self.object(&[head.as_bytes(), &compressed, b"\nendstream"].concat());
    }

    fn finish(mut self) -> Vec<u8> {
        let table = self.bytes.len();
        let n = self.starts.len() + 1;
        let mut tail = format!("xref\n0 {n}\n0000000000 65535 f \n");
        for start in &self.starts {
            let _ = writeln!(tail, "{start:010} 00000 n ");
        }
        let _ = write!(
            tail,
            "trailer\n<< /Size {n} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n"
        );
        self.bytes.extend_from_slice(tail.as_bytes());
        self.bytes
    }
}
