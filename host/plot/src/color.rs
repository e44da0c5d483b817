//! Colours: one scale for numbers, one palette for things.
//!
//! Both are safe for colour-blind readers, and the scale also on a black-and-white printer: its lightness grows with
//! the number, in steps that look equal.

use std::sync::LazyLock;

/// Red, green, blue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Color(pub(crate) [u8; 3]);

/// Paper.
pub(crate) const WHITE: Color = Color([255; 3]);
/// Text.
pub(crate) const INK: Color = Color([34; 3]);
/// Axes and ticks.
pub(crate) const LINE: Color = Color([119; 3]);
/// Grid lines.
pub(crate) const GRID: Color = Color([229; 3]);
/// Cells whose number is NaN.
pub(crate) const MISSING: Color = Color([204; 3]);

/// Shades of [`heat`]. With them and as many greys a picture fits into the 256 colours of a GIF.
pub(crate) const N_SHADES: usize = 200;

/// Okabe and Ito's palette in the order of contrast on white, without black and yellow.
const PALETTE: [Color; 6] = [
    Color([0, 114, 178]),
    Color([213, 94, 0]),
    Color([0, 158, 115]),
    Color([204, 121, 167]),
    Color([230, 159, 0]),
    Color([86, 180, 233]),
];

/// The colour of series `index` of `n`: of the palette while it lasts; more are layers or steps, and their order shows
/// on the scale of [`heat`].
pub(crate) fn series(index: usize, n: usize) -> Color {
    if n <= PALETTE.len() {
        return PALETTE[index % PALETTE.len()];
    }
    // The lightest colours do not stand out on paper.
    heat(0.88 * index as f32 / (n - 1) as f32)
}

/// The colour of a number `t` in `0..=1`, from dark violet over teal to yellow; [`MISSING`] for NaN.
///
/// ```text
/// lightness L = 0.26 + 0.66 t     hue h = 308° - 205° t
/// chroma    C = 0.094 + k (2t - 1)²     k = 0.036 below the middle, 0.09 above: inside sRGB everywhere
/// ```
///
/// # Source
/// `L`, `C`, `h` are polar coordinates of Björn Ottosson's `OKLab`, in which equal distances look equal.
pub(crate) fn heat(t: f32) -> Color {
    static SHADES: LazyLock<Vec<Color>> = LazyLock::new(|| {
        (0..N_SHADES)
            .map(|index| shade(index as f64 / (N_SHADES - 1) as f64))
            .collect()
    });
    if t.is_nan() {
        return MISSING;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to the number of shades"
    )]
    let index = (t.clamp(0.0, 1.0) * (N_SHADES - 1) as f32).round() as usize;
    SHADES[index]
}

fn shade(t: f64) -> Color {
    let middle = (2.0 * t - 1.0).powi(2);
    let chroma = 0.094 + middle * if t < 0.5 { 0.036 } else { 0.09 };
    let hue = (308.0 - 205.0 * t).to_radians();
    from_oklab(0.26 + 0.66 * t, chroma * hue.cos(), chroma * hue.sin())
}

fn from_oklab(lightness: f64, a: f64, b: f64) -> Color {
    let long = (lightness + 0.396_337_777_4 * a + 0.215_803_757_3 * b).powi(3);
    let medium = (lightness - 0.105_561_345_8 * a - 0.063_854_172_8 * b).powi(3);
    let short = (lightness - 0.089_484_177_5 * a - 1.291_485_548_0 * b).powi(3);
    Color([
        to_srgb(4.076_741_662_1 * long - 3.307_711_591_3 * medium + 0.230_969_929_2 * short),
        to_srgb(-1.268_438_004_6 * long + 2.609_757_401_1 * medium - 0.341_319_396_5 * short),
        to_srgb(-0.004_196_086_3 * long - 0.703_418_614_7 * medium + 1.707_614_701_0 * short),
    ])
}

/// Linear light to the byte of a screen.
fn to_srgb(linear: f64) -> u8 {
    let linear = linear.clamp(0.0, 1.0);
    let value = if linear <= 0.003_130_8 {
        12.92 * linear
    } else {
        1.055 * linear.powf(1.0 / 2.4) - 0.055
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "in 0..=255"
    )]
    let byte = (value * 255.0).round() as u8;
    byte
}

impl Color {
    /// How light it looks, in `0.0..=255.0`.
    pub(crate) fn luma(self) -> f32 {
        let [red, green, blue] = self.0.map(f32::from);
        0.299 * red + 0.587 * green + 0.114 * blue
    }

    /// Black or white, whichever can be read on it.
    pub(crate) fn contrast(self) -> Color {
        if self.luma() < 140.0 { WHITE } else { INK }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_number_is_lighter() {
        let shades: Vec<f32> = (0..N_SHADES)
            .map(|index| heat(index as f32 / (N_SHADES - 1) as f32).luma())
            .collect();
        assert!(shades.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(
            shades[0] < 45.0 && shades[N_SHADES - 1] > 210.0,
            "{shades:?}"
        );
    }

    #[test]
    fn numbers_off_the_scale_have_the_colours_of_its_ends() {
        assert_eq!(heat(-3.0), heat(0.0));
        assert_eq!(heat(f32::INFINITY), heat(1.0));
        assert_eq!(heat(f32::NAN), MISSING);
    }

    #[test]
    fn every_series_has_a_colour_of_its_own() {
        for n in [1, 6, 7, 18] {
            let mut colors: Vec<[u8; 3]> = (0..n).map(|index| series(index, n).0).collect();
            colors.sort_unstable();
            colors.dedup();
            assert_eq!(colors.len(), n);
        }
    }
}
