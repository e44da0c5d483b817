//! A figure as PDF of one page: text stays text, in a part of the font that is embedded as TrueType.

use super::font;
use super::picture::{Area, Paint, Picture, Shape, Text, Unreadable};
use flate2::Compression;
use flate2::write::ZlibEncoder;
use pdf_writer::types::{CidFontType, FontFlags, LineJoinStyle, SystemInfo, UnicodeCmap};
use pdf_writer::{Content, Filter, Finish, Name, Pdf, Rect, Ref, Str};
use std::collections::BTreeMap;
use std::io::Write;
use subsetter::GlyphRemapper;
use ttf_parser::Face;

/// An SVG's unit is 1/96 inch, a PDF's 1/72.
const POINTS: f32 = 0.75;
const FONT: Name<'static> = Name(b"F");
const IDENTITY: SystemInfo<'static> = SystemInfo {
    registry: Str(b"Adobe"),
    ordering: Str(b"Identity"),
    supplement: 0,
};
/// Distance of the control points of a quarter circle of radius 1.
const ROUND: f32 = 0.552_285;

/// Makes the file.
pub(crate) fn pdf(svg: &str) -> Result<Vec<u8>, Unreadable> {
    let picture = Picture::read(svg)?;
    let face = font::face()?;
    let mut page = Page {
        content: Content::new(),
        face,
        glyphs: GlyphRemapper::new(),
        letters: BTreeMap::new(),
        images: Vec::new(),
        opacities: Vec::new(),
    };
    let height = picture.height * POINTS;
    // Lengths grow downwards, as in the SVG.
    page.content
        .transform([POINTS, 0.0, 0.0, -POINTS, 0.0, height]);
    for shape in &picture.shapes {
        page.draw(shape)?;
    }
    page.finish(picture.width * POINTS, height)
}

/// A page that is being written.
struct Page {
    content: Content,
    face: Face<'static>,
    /// Glyphs that are used, and their numbers in the part of the font.
    glyphs: GlyphRemapper,
    /// Character and width of each of them, in 1/1000 of the size.
    letters: BTreeMap<u16, (char, f32)>,
    /// Width, height and compressed samples.
    images: Vec<(u32, u32, Vec<u8>)>,
    opacities: Vec<f32>,
}

impl Page {
    fn draw(&mut self, shape: &Shape) -> Result<(), Unreadable> {
        match shape {
            Shape::Box(
                Area {
                    x,
                    y,
                    width,
                    height,
                },
                paint,
            ) => {
                self.painted(paint, |content| {
                    content.rect(*x, *y, *width, *height);
                });
            }
            Shape::Path(points, paint) => self.painted(paint, |content| {
                for (index, &(x, y)) in points.iter().enumerate() {
                    if index == 0 {
                        content.move_to(x, y);
                    } else {
                        content.line_to(x, y);
                    }
                }
            }),
            Shape::Dot {
                x,
                y,
                radius,
                paint,
            } => {
                self.painted(paint, |content| circle(content, *x, *y, *radius));
            }
            Shape::Text(text) => self.text(text),
            Shape::Image(area, png) => self.image(area, png)?,
        }
        Ok(())
    }

    fn painted(&mut self, paint: &Paint, path: impl FnOnce(&mut Content)) {
        self.content.save_state();
        match *paint {
            Paint::Fill {
                color: [r, g, b],
                opacity,
            } => {
                if opacity < 1.0 {
                    self.opacities.push(opacity);
                    self.content
                        .set_parameters(Name(name('G', self.opacities.len()).as_bytes()));
                }
                self.content.set_fill_rgb(r, g, b);
                path(&mut self.content);
                self.content.fill_nonzero();
            }
            Paint::Stroke {
                color: [r, g, b],
                width,
            } => {
                self.content.set_stroke_rgb(r, g, b);
                self.content.set_line_width(width);
                self.content.set_line_join(LineJoinStyle::RoundJoin);
                path(&mut self.content);
                self.content.stroke();
            }
        }
        self.content.restore_state();
    }

    fn text(&mut self, text: &Text) {
        let units = f32::from(self.face.units_per_em());
        let mut codes = Vec::new();
        for letter in text.content.chars() {
            let glyph = font::glyph(&self.face, letter);
            let code = self.glyphs.remap(glyph.0);
            let width = font::advance(&self.face, glyph) * 1000.0 / units;
            self.letters.insert(code, (letter, width));
            codes.extend(code.to_be_bytes());
        }
        let (sin, cos) = text.turn.to_radians().sin_cos();
        let offset = font::offset(&self.face, text);
        let (x, y) = (text.x - offset * cos, text.y - offset * sin);
        let [red, green, blue] = text.fill;
        self.content.begin_text();
        self.content.set_fill_rgb(red, green, blue);
        self.content.set_font(FONT, text.size);
        // Upright again, and turned.
        self.content.set_text_matrix([cos, sin, sin, -cos, x, y]);
        self.content.show(Str(&codes));
        self.content.end_text();
    }

    fn image(&mut self, area: &Area, png: &[u8]) -> Result<(), Unreadable> {
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info()?;
        let info = reader.info();
        let (width, height) = info.size();
        if (info.color_type, info.bit_depth) != (png::ColorType::Rgb, png::BitDepth::Eight) {
            return Err(Unreadable(format!(
                "an image has colours of another kind: {:?}",
                info.color_type
            )));
        }
        let size = reader.output_buffer_size();
        let mut samples =
            vec![0; size.ok_or_else(|| Unreadable("an image is too large".to_owned()))?];
        reader.next_frame(&mut samples)?;
        self.images.push((width, height, deflated(&samples)?));
        self.content.save_state();
        // The unit square of an image has its first row at the top.
        self.content.transform([
            area.width,
            0.0,
            0.0,
            -area.height,
            area.x,
            area.y + area.height,
        ]);
        self.content
            .x_object(Name(name('I', self.images.len()).as_bytes()));
        self.content.restore_state();
        Ok(())
    }

    fn finish(self, width: f32, height: f32) -> Result<Vec<u8>, Unreadable> {
        let mut last = 0;
        let mut id = || {
            last += 1;
            Ref::new(last)
        };
        let (catalog, pages, page_id, content, type0) = (id(), id(), id(), id(), id());
        let images: Vec<Ref> = self.images.iter().map(|_| id()).collect();
        let states: Vec<Ref> = self.opacities.iter().map(|_| id()).collect();
        let mut pdf = Pdf::new();
        pdf.catalog(catalog).pages(pages);
        pdf.pages(pages).kids([page_id]).count(1);
        let mut page = pdf.page(page_id);
        page.media_box(Rect::new(0.0, 0.0, width, height));
        page.parent(pages).contents(content);
        let mut resources = page.resources();
        if !self.letters.is_empty() {
            resources.fonts().pair(FONT, type0);
        }
        if !images.is_empty() {
            let mut objects = resources.x_objects();
            for (index, image) in images.iter().enumerate() {
                objects.pair(Name(name('I', index + 1).as_bytes()), *image);
            }
        }
        if !states.is_empty() {
            let mut named = resources.ext_g_states();
            for (index, state) in states.iter().enumerate() {
                named.pair(Name(name('G', index + 1).as_bytes()), *state);
            }
        }
        resources.finish();
        page.finish();
        let drawn = deflated(&self.content.finish())?;
        pdf.stream(content, &drawn).filter(Filter::FlateDecode);
        for ((width, height, samples), image) in self.images.iter().zip(images) {
            let mut object = pdf.image_xobject(image, samples);
            object.filter(Filter::FlateDecode);
            object
                .width(i32::try_from(*width)?)
                .height(i32::try_from(*height)?);
            object.color_space().device_rgb();
            object.bits_per_component(8).interpolate(false);
        }
        for (opacity, state) in self.opacities.iter().zip(states) {
            pdf.ext_graphics(state).non_stroking_alpha(*opacity);
        }
        if !self.letters.is_empty() {
            write_font(
                &mut pdf,
                &self.face,
                &self.glyphs,
                &self.letters,
                [type0, id(), id(), id(), id()],
            )?;
        }
        Ok(pdf.finish())
    }
}

/// Writes the part of the font that is used, as TrueType in a composite font.
fn write_font(
    pdf: &mut Pdf,
    face: &Face,
    glyphs: &GlyphRemapper,
    letters: &BTreeMap<u16, (char, f32)>,
    [type0, cid, descriptor, file, unicode]: [Ref; 5],
) -> Result<(), Unreadable> {
    let part = subsetter::subset(font::file(), 0, glyphs)?;
    // Six letters say that it is a part.
    let base = Name(b"MOEUTP+DejaVuSans");
    pdf.type0_font(type0)
        .base_font(base)
        .encoding_predefined(Name(b"Identity-H"))
        .descendant_font(cid)
        .to_unicode(unicode);
    let mut font = pdf.cid_font(cid);
    font.subtype(CidFontType::Type2)
        .base_font(base)
        .system_info(IDENTITY)
        .font_descriptor(descriptor)
        .default_width(0.0)
        .cid_to_gid_map_predefined(Name(b"Identity"));
    let mut widths = font.widths();
    for (&code, &(_, width)) in letters {
        widths.consecutive(code, [width]);
    }
    widths.finish();
    font.finish();
    let scale = 1000.0 / f32::from(face.units_per_em());
    let bounds = face.global_bounding_box();
    let [left, low, right, high] = [bounds.x_min, bounds.y_min, bounds.x_max, bounds.y_max]
        .map(|edge| f32::from(edge) * scale);
    pdf.font_descriptor(descriptor)
        .name(base)
        .flags(FontFlags::SYMBOLIC)
        .bbox(Rect::new(left, low, right, high))
        .italic_angle(0.0)
        .ascent(f32::from(face.ascender()) * scale)
        .descent(f32::from(face.descender()) * scale)
        .cap_height(f32::from(face.capital_height().unwrap_or(face.ascender())) * scale)
        .stem_v(80.0)
        .font_file2(file);
    let packed = deflated(&part)?;
    let mut stream = pdf.stream(file, &packed);
    stream.filter(Filter::FlateDecode);
    stream.pair(Name(b"Length1"), i32::try_from(part.len())?);
    stream.finish();
    let mut characters = UnicodeCmap::<u16>::new(Name(b"Custom"), IDENTITY);
    for (&code, &(c, _)) in letters {
        characters.pair(code, c);
    }
    pdf.cmap(unicode, &characters.finish());
    Ok(())
}

fn circle(content: &mut Content, x: f32, y: f32, r: f32) {
    let k = r * ROUND;
    content.move_to(x + r, y);
    for [(x1, y1), (x2, y2), (x3, y3)] in [
        [(r, k), (k, r), (0.0, r)],
        [(-k, r), (-r, k), (-r, 0.0)],
        [(-r, -k), (-k, -r), (0.0, -r)],
        [(k, -r), (r, -k), (r, 0.0)],
    ] {
        content.cubic_to(x + x1, y + y1, x + x2, y + y2, x + x3, y + y3);
    }
    content.close_path();
}

/// Of an image or a graphics state.
fn name(kind: char, number: usize) -> String {
    format!("{kind}{number}")
}

fn deflated(bytes: &[u8]) -> Result<Vec<u8>, Unreadable> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use moeut_plot::{Axis, Heatmap, Matrix, Plot, Series, XyChart};

    fn contains(bytes: &[u8], text: &str) -> bool {
        bytes
            .windows(text.len())
            .any(|window| window == text.as_bytes())
    }

    /// Publishers refuse Type 3 fonts, and fonts that are not embedded.
    #[test]
    fn text_is_in_an_embedded_truetype_font() {
        let chart = Plot::from(XyChart {
            x: Axis::new("parameters"),
            y: Axis::new("σ-MoE").log(),
            series: vec![
                Series::new("a", vec![1.0, 20.0]),
                Series::new("b", vec![3.0]),
            ],
        });
        let pdf = pdf(&chart.to_svg("title")).unwrap();
        assert!(pdf.starts_with(b"%PDF-1."));
        for part in [
            "/Subtype /Type0",
            "/Subtype /CIDFontType2",
            "/FontFile2",
            "/ToUnicode",
            "%%EOF",
        ] {
            assert!(contains(&pdf, part), "{part}");
        }
        for part in ["/Type3", "/Type1", "/Helvetica"] {
            assert!(!contains(&pdf, part), "{part}");
        }
        // The whole font has 757,000 bytes.
        assert!(pdf.len() < 40_000, "{}", pdf.len());
    }

    #[test]
    fn a_matrix_of_many_cells_is_an_image() {
        let heatmap = Heatmap {
            matrix: Matrix::new(300, vec![0.5; 90_000]),
            ..Heatmap::default()
        };
        let svg = Plot::from(heatmap).to_svg("");
        assert!(svg.contains("<image"));
        let pdf = pdf(&svg).unwrap();
        assert!(contains(&pdf, "/Subtype /Image") && contains(&pdf, "/Width 300"));
    }

    #[test]
    fn what_is_unknown_is_an_error_and_no_hole_in_the_figure() {
        let svg = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"4\" height=\"2\"><path d=\"M0 0\"/></svg>";
        let Unreadable(why) = pdf(svg).unwrap_err();
        assert_eq!(why, "the element `path` is unknown");
    }
}
