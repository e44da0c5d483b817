//! Frames as GIF: what every browser and both dashboards show without a player.

use crate::color::{MISSING, N_SHADES, heat};
use crate::drawing::Pixels;
use crate::heatmap;
use crate::plot::Frames;
use crate::raster::render;
use std::collections::HashMap;

/// Hundredths of a second that a frame is shown: two per second, as in the reference.
const DELAY: u16 = 50;
/// Pixels per unit. Less than a still's: a GIF is large, and cells have sharp borders anyway.
const SCALE: f32 = 1.0;
/// Longest animation; of longer ones every second, third, … frame is taken.
const MAX_FRAMES: usize = 256;

impl Frames {
    /// The heat maps one after the other, two per second, for ever. Empty frames make a picture that says so.
    pub fn to_gif(&self) -> Vec<u8> {
        let step = self.frames.len().div_ceil(MAX_FRAMES).max(1);
        let mut pictures = heatmap::of_frames(self)
            .step_by(step)
            .map(|(name, chart)| render(&heatmap::heatmap(&chart, name), SCALE));
        let first = pictures
            .next()
            .unwrap_or_else(|| render(&heatmap::stills(self, ""), SCALE));
        encode(first, pictures)
    }
}

/// Pictures of other sizes than the first one are cut or stand on its upper left corner.
fn encode(first: Pixels, rest: impl Iterator<Item = Pixels>) -> Vec<u8> {
    let mut palette = Palette::new();
    let (width, height) = (side(first.width), side(first.height));
    let mut out = Vec::new();
    let Ok(mut encoder) = gif::Encoder::new(&mut out, width, height, &palette.colors) else {
        return Vec::new();
    };
    let mut written = encoder.set_repeat(gif::Repeat::Infinite);
    for picture in std::iter::once(first).chain(rest) {
        let (width, height) = (
            side(picture.width).min(width),
            side(picture.height).min(height),
        );
        let rows = picture
            .rgb
            .chunks(picture.width as usize * 3)
            .take(height.into());
        let pixels = rows.flat_map(|row| row.chunks_exact(3).take(width.into()));
        let indices: Vec<u8> = pixels.map(|pixel| palette.nearest(pixel)).collect();
        let mut frame = gif::Frame::from_indexed_pixels(width, height, indices, None);
        frame.delay = DELAY;
        written = written.and_then(|()| encoder.write_frame(&frame));
    }
    debug_assert!(written.is_ok(), "memory takes everything: {written:?}");
    drop(encoder);
    out
}

fn side(length: u32) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}

/// All shades of the colour scale, and as many greys for text.
struct Palette {
    colors: Vec<u8>,
    known: HashMap<[u8; 3], u8>,
}

impl Palette {
    fn new() -> Self {
        let shades = (0..N_SHADES).map(|index| heat(index as f32 / (N_SHADES - 1) as f32).0);
        let n_greys = 255 - N_SHADES;
        let greys = (0..n_greys).map(|index| {
            let grey = u8::try_from(index * 255 / (n_greys - 1)).unwrap_or(255);
            [grey; 3]
        });
        let all: Vec<[u8; 3]> = shades.chain(greys).chain([MISSING.0]).collect();
        let known = (0..=255u8).zip(&all).map(|(index, &color)| (color, index));
        Self {
            known: known.collect(),
            colors: all.concat(),
        }
    }

    fn nearest(&mut self, pixel: &[u8]) -> u8 {
        let color = [pixel[0], pixel[1], pixel[2]];
        if let Some(&index) = self.known.get(&color) {
            return index;
        }
        let distance = |candidate: &[u8]| -> u32 {
            let differences = candidate
                .iter()
                .zip(color)
                .map(|(&a, b)| u32::from(a.abs_diff(b)));
            differences.map(|difference| difference * difference).sum()
        };
        let candidates = (0..=255u8).zip(self.colors.chunks(3));
        let nearest = candidates.min_by_key(|(_, candidate)| distance(candidate));
        let index = nearest.map_or(0, |(index, _)| index);
        self.known.insert(color, index);
        index
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plot::Matrix;

    fn frames(n: usize) -> Frames {
        let frame = |index: usize| Matrix {
            n_rows: 2,
            n_cols: 2,
            values: vec![index as f32, 0.0, f32::NAN, 1.0],
        };
        Frames {
            frames: (0..n)
                .map(|index| (format!("layer {index}"), frame(index)))
                .collect(),
            ..Frames::default()
        }
    }

    fn read(file: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut decoder = gif::DecodeOptions::new();
        decoder.set_color_output(gif::ColorOutput::RGBA);
        let mut decoder = decoder.read_info(file).unwrap();
        let mut found = Vec::new();
        while let Some(frame) = decoder.read_next_frame().unwrap() {
            found.push((frame.delay, frame.buffer.to_vec()));
        }
        found
    }

    #[test]
    fn every_frame_is_there_and_stays_half_a_second() {
        let found = read(&frames(5).to_gif());
        assert_eq!(found.len(), 5);
        assert!(found.iter().all(|(delay, _)| *delay == 50));
        assert_ne!(found[0].1, found[4].1);
    }

    #[test]
    fn cells_have_their_exact_colours() {
        let found = read(&frames(2).to_gif());
        let has = |color: [u8; 3]| {
            found[0]
                .1
                .chunks(4)
                .filter(|pixel| pixel[..3] == color)
                .count()
                > 100
        };
        assert!(has(heat(0.0).0) && has(heat(1.0).0) && has(MISSING.0));
    }

    #[test]
    fn long_animations_skip_frames_and_none_is_a_picture() {
        assert_eq!(read(&frames(600).to_gif()).len(), 200);
        assert_eq!(read(&frames(0).to_gif()).len(), 1);
    }
}
