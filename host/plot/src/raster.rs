//! A drawing as pixels, and pixels as PNG.

use crate::color::Color;
use crate::drawing::{Anchor, Area, Drawing, Pixels, Shape, Text};
use crate::font;
use tiny_skia::{
    FillRule, FilterQuality, LineCap, LineJoin, Paint, Path, PathBuilder, Pixmap, PixmapPaint,
    PremultipliedColorU8, Rect, Stroke, Transform,
};

/// Pixels per unit: sharp on today's screens.
pub(crate) const SCALE: f32 = 2.0;
/// Longest side of a picture, in pixels. A larger drawing is scaled down.
const MAX_SIDE: f32 = 8192.0;

/// Draws on white.
pub(crate) fn render(drawing: &Drawing, scale: f32) -> Pixels {
    let longest = drawing.width.max(drawing.height).max(1.0);
    let scale = scale.min(MAX_SIDE / longest);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 1 and the longest side"
    )]
    let pixels = |length: f32| (length * scale).ceil().clamp(1.0, MAX_SIDE) as u32;
    let (width, height) = (pixels(drawing.width), pixels(drawing.height));
    let Some(pixmap) = Pixmap::new(width, height) else {
        // Only sides of 0 or of more than two billion are refused.
        return Pixels {
            width: 1,
            height: 1,
            rgb: vec![255; 3],
        };
    };
    let mut canvas = Canvas { pixmap, scale };
    canvas.pixmap.fill(tiny_skia::Color::WHITE);
    for shape in &drawing.shapes {
        canvas.draw(shape);
    }
    let rgb = canvas.pixmap.pixels().iter();
    Pixels {
        width,
        height,
        rgb: rgb
            .flat_map(|pixel| [pixel.red(), pixel.green(), pixel.blue()])
            .collect(),
    }
}

/// A PNG of pixels with three bytes each; what is missing of `rgb` is black.
pub(crate) fn png(width: u32, height: u32, rgb: &[u8]) -> Vec<u8> {
    let (width, height) = (width.max(1), height.max(1));
    let n_bytes = width as usize * height as usize * 3;
    let mut out = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut out, width, height);
    encoder.set_color(::png::ColorType::Rgb);
    encoder.set_compression(::png::Compression::Fast);
    let written = encoder.write_header().and_then(|mut writer| {
        if rgb.len() == n_bytes {
            return writer.write_image_data(rgb);
        }
        let mut whole = rgb.to_vec();
        whole.resize(n_bytes, 0);
        writer.write_image_data(&whole)
    });
    debug_assert!(written.is_ok(), "memory takes everything: {written:?}");
    out
}

struct Canvas {
    pixmap: Pixmap,
    scale: f32,
}

impl Canvas {
    fn draw(&mut self, shape: &Shape) {
        match shape {
            Shape::Box { area, fill } => self.fill_box(area, *fill),
            Shape::Frame {
                area,
                stroke,
                width,
            } => {
                if let Some(rect) = rect(area) {
                    self.stroke(&PathBuilder::from_rect(rect), *stroke, *width);
                }
            }
            Shape::Line {
                points,
                stroke,
                width,
            } => {
                if let Some(path) = path(points, false) {
                    self.stroke(&path, *stroke, *width);
                }
            }
            Shape::Band {
                points,
                fill,
                opacity,
            } => {
                if let Some(path) = path(points, true) {
                    self.fill(&path, &paint(*fill, *opacity));
                }
            }
            Shape::Dot { x, y, radius, fill } => {
                if let Some(path) = PathBuilder::from_circle(*x, *y, *radius) {
                    self.fill(&path, &paint(*fill, 1.0));
                }
            }
            Shape::Text(text) => self.text(text),
            Shape::Pixels { area, pixels } => self.pixels(area, pixels),
        }
    }

    fn transform(&self) -> Transform {
        Transform::from_scale(self.scale, self.scale)
    }

    fn fill_box(&mut self, area: &Area, fill: Color) {
        if let Some(rect) = rect(area) {
            let transform = self.transform();
            self.pixmap
                .fill_rect(rect, &paint(fill, 1.0), transform, None);
        }
    }

    fn fill(&mut self, path: &Path, paint: &Paint) {
        let transform = self.transform();
        self.pixmap
            .fill_path(path, paint, FillRule::Winding, transform, None);
    }

    fn stroke(&mut self, path: &Path, stroke: Color, width: f32) {
        let pen = Stroke {
            width,
            line_join: LineJoin::Round,
            line_cap: LineCap::Butt,
            ..Stroke::default()
        };
        let transform = self.transform();
        self.pixmap
            .stroke_path(path, &paint(stroke, 1.0), &pen, transform, None);
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
        let transform = self
            .transform()
            .pre_translate(text.x, text.y)
            .pre_concat(Transform::from_rotate(text.turn))
            .pre_translate(shift, 0.0);
        self.pixmap.fill_path(
            &path,
            &paint(text.fill, 1.0),
            FillRule::Winding,
            transform,
            None,
        );
    }

    fn pixels(&mut self, area: &Area, pixels: &Pixels) {
        let Some(mut source) = Pixmap::new(pixels.width, pixels.height) else {
            return;
        };
        for (to, from) in source
            .pixels_mut()
            .iter_mut()
            .zip(pixels.rgb.chunks_exact(3))
        {
            if let Some(color) = PremultipliedColorU8::from_rgba(from[0], from[1], from[2], 255) {
                *to = color;
            }
        }
        let transform = self.transform().pre_concat(Transform::from_row(
            area.width / pixels.width as f32,
            0.0,
            0.0,
            area.height / pixels.height as f32,
            area.left,
            area.top,
        ));
        let paint = PixmapPaint {
            quality: FilterQuality::Nearest,
            ..PixmapPaint::default()
        };
        self.pixmap
            .draw_pixmap(0, 0, source.as_ref(), &paint, transform, None);
    }
}

fn paint(color: Color, opacity: f32) -> Paint<'static> {
    let [red, green, blue] = color.0;
    let mut color = tiny_skia::Color::from_rgba8(red, green, blue, 255);
    color.set_alpha(opacity);
    Paint {
        shader: tiny_skia::Shader::SolidColor(color),
        ..Paint::default()
    }
}

fn rect(area: &Area) -> Option<Rect> {
    Rect::from_xywh(area.left, area.top, area.width, area.height)
}

fn path(points: &[(f32, f32)], closes: bool) -> Option<Path> {
    let mut builder = PathBuilder::new();
    let (&(x, y), rest) = points.split_first()?;
    builder.move_to(x, y);
    for &(x, y) in rest {
        builder.line_to(x, y);
    }
    if closes {
        builder.close();
    }
    builder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_png_has_the_given_pixels() {
        let rgb: Vec<u8> = (0..2 * 3 * 3).collect();
        let file = png(2, 3, &rgb);
        let mut reader = ::png::Decoder::new(std::io::Cursor::new(file))
            .read_info()
            .unwrap();
        let mut found = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut found).unwrap();
        assert_eq!((info.width, info.height), (2, 3));
        assert_eq!(found, rgb);
    }

    #[test]
    fn a_picture_without_pixels_is_one() {
        assert!(png(0, 0, &[]).starts_with(b"\x89PNG"));
        assert_eq!(render(&Drawing::default(), SCALE).rgb, [255; 3]);
    }

    #[test]
    fn cells_are_sharp() {
        let area = Area {
            width: 4.0,
            height: 2.0,
            ..Area::default()
        };
        let pixels = Pixels {
            width: 2,
            height: 1,
            rgb: vec![10, 20, 30, 200, 210, 220],
        };
        let drawing = Drawing {
            width: 4.0,
            height: 2.0,
            shapes: vec![Shape::Pixels { area, pixels }],
        };
        let drawn = render(&drawing, 1.0);
        let row: Vec<u8> = [[10, 20, 30], [10, 20, 30], [200, 210, 220], [200, 210, 220]].concat();
        assert_eq!(drawn.rgb, [row.clone(), row].concat());
    }
}
