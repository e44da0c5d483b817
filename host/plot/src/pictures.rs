//! What is shown as it is: pictures in a grid, and tables.

use crate::axes::{self, GAP, LINE_HEIGHT, MARGIN, SIZE, one_line, write_title};
use crate::color::{GRID, INK, LINE};
use crate::drawing::{Anchor, Area, Drawing, Pixels, Shape};
use crate::font;
use crate::plot::{Image, Table};

/// Longest side of a picture in a grid; smaller ones are enlarged by whole factors.
const SIDE: f32 = 256.0;
/// Room of a column of a table.
const MAX_COLUMN: f32 = 320.0;
/// Rows of a table that are drawn.
const MAX_ROWS: usize = 100;
/// Columns of a table that are drawn.
const MAX_COLUMNS: usize = 24;

/// Pictures in rows, as many as in a square.
pub(crate) fn images(images: &[Image], title: &str) -> Drawing {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at least 1"
    )]
    let n_cols = (images.len() as f32).sqrt().ceil().max(1.0) as usize;
    let sizes: Vec<(f32, f32)> = images.iter().map(shown_size).collect();
    let widest = sizes
        .iter()
        .fold(SIDE / 2.0, |widest, size| widest.max(size.0));
    let mut top = MARGIN + 24.0;
    let mut drawing = Drawing {
        width: MARGIN * 2.0 + n_cols as f32 * (widest + 2.0 * GAP) - 2.0 * GAP,
        ..Drawing::default()
    };
    write_title(&mut drawing, title);
    for row in images.chunks(n_cols).zip(sizes.chunks(n_cols)) {
        let mut bottom = top;
        for (col, (image, &(width, height))) in row.0.iter().zip(row.1).enumerate() {
            let area = Area {
                left: MARGIN + col as f32 * (widest + 2.0 * GAP),
                top,
                width,
                height,
            };
            drawing.shapes.push(Shape::Pixels {
                area,
                pixels: pixels(image),
            });
            let caption = one_line(&image.caption, widest);
            drawing.text(axes::label(
                area.left,
                area.bottom() + LINE_HEIGHT,
                &caption,
                Anchor::Start,
            ));
            bottom = area.bottom().max(bottom);
        }
        top = bottom + LINE_HEIGHT + 2.0 * GAP;
    }
    drawing.height = top + MARGIN;
    drawing
}

fn shown_size(image: &Image) -> (f32, f32) {
    let (width, height) = (image.width.max(1) as f32, image.height.max(1) as f32);
    let factor = SIDE / width.max(height);
    let factor = if factor > 1.0 { factor.floor() } else { factor };
    (width * factor, height * factor)
}

/// As many pixels as the picture says; what is missing is black.
fn pixels(image: &Image) -> Pixels {
    let n_bytes = image.width as usize * image.height as usize * 3;
    let mut rgb = image.rgb.clone();
    if n_bytes == 0 || n_bytes > rgb.len() + (1 << 26) {
        // A size that has nothing to do with the bytes is not worth the memory.
        return Pixels {
            width: 1,
            height: 1,
            rgb: vec![0; 3],
        };
    }
    rgb.resize(n_bytes, 0);
    Pixels {
        width: image.width,
        height: image.height,
        rgb,
    }
}

impl Image {
    /// The picture as PNG, pixel by pixel, without its caption. Pixels that are missing are black.
    pub fn to_png(&self) -> Vec<u8> {
        let pixels = pixels(self);
        crate::raster::png(pixels.width, pixels.height, &pixels.rgb)
    }
}

/// Rows under a header; long cells and long tables are cut.
pub(crate) fn table(table: &Table, title: &str) -> Drawing {
    let rows = &table.rows[..table.rows.len().min(MAX_ROWS)];
    let n_cols = rows
        .iter()
        .map(Vec::len)
        .max()
        .unwrap_or(0)
        .max(table.header.len())
        .min(MAX_COLUMNS);
    let cell = |row: &Vec<String>, col: usize| {
        row.get(col)
            .map(|text| one_line(text, MAX_COLUMN))
            .unwrap_or_default()
    };
    let mut drawing = Drawing::default();
    let mut left = MARGIN;
    let top = MARGIN + 24.0;
    for col in 0..n_cols {
        let column = std::iter::once(&table.header)
            .chain(rows)
            .map(|row| cell(row, col));
        let mut width = 0f32;
        for (index, text) in column.enumerate() {
            width = width.max(font::width(&text, SIZE));
            let y = top + (index as f32 + 1.0) * LINE_HEIGHT + if index > 0 { 4.0 } else { 0.0 };
            drawing.text(axes::label(left, y, &text, Anchor::Start));
        }
        left += width + 3.0 * GAP;
    }
    drawing.width = left.max(200.0) + MARGIN;
    drawing.height = top + (rows.len() as f32 + 1.0) * LINE_HEIGHT + 2.0 * MARGIN;
    let rule = |y: f32| vec![(MARGIN, y), (left - 2.0 * GAP, y)];
    drawing.line(rule(top + LINE_HEIGHT + 4.0), INK, 1.0);
    for index in 1..rows.len() {
        let y = top + (index as f32 + 1.0) * LINE_HEIGHT + 8.0;
        drawing.line(rule(y - 0.5), GRID, 0.5);
    }
    let n_left = table.rows.len() - rows.len();
    if n_left > 0 {
        let text = format!("and {n_left} more rows");
        let mut text = axes::label(MARGIN, drawing.height + GAP, &text, Anchor::Start);
        text.fill = LINE;
        drawing.text(text);
        drawing.height += LINE_HEIGHT;
    }
    write_title(&mut drawing, title);
    drawing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pictures_are_enlarged_by_whole_factors() {
        let size = |width, height| {
            shown_size(&Image {
                width,
                height,
                ..image()
            })
        };
        assert_eq!(size(28, 28), (252.0, 252.0));
        assert_eq!(size(512, 256), (256.0, 128.0));
        assert_eq!(size(0, 0), (256.0, 256.0));
    }

    fn image() -> Image {
        Image {
            width: 2,
            height: 2,
            rgb: vec![255; 12],
            caption: String::new(),
        }
    }

    #[test]
    fn a_picture_that_lacks_bytes_is_black_there() {
        let short = Image {
            rgb: vec![9; 6],
            ..image()
        };
        assert_eq!(pixels(&short).rgb, [9, 9, 9, 9, 9, 9, 0, 0, 0, 0, 0, 0]);
        let absurd = Image {
            width: u32::MAX,
            height: u32::MAX,
            ..image()
        };
        assert!(absurd.to_png().starts_with(b"\x89PNG"));
    }

    #[test]
    fn long_tables_say_how_much_is_left_out() {
        let table = super::table(
            &Table {
                header: vec!["a".to_owned()],
                rows: vec![vec!["1".to_owned()]; 130],
            },
            "",
        );
        let mut texts = table.shapes.iter().filter_map(|shape| match shape {
            Shape::Text(text) => Some(text.content.as_str()),
            _ => None,
        });
        assert_eq!(texts.next_back(), Some("and 30 more rows"));
    }
}
