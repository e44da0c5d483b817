//! The forms of a chart that are pictures.

use crate::drawing::Drawing;
use crate::plot::Plot;
use crate::{curves, heatmap, pictures, raster, svg};

impl Plot {
    /// The chart as an SVG document. Text stays text, in `DejaVu Sans` where the viewer has it.
    ///
    /// Whatever the data are, there is a picture: NaN is a gap or a grey cell, and no data say so.
    pub fn to_svg(&self, title: &str) -> String {
        svg::write(&self.draw(title))
    }

    /// The chart as PNG, two pixels per unit of the SVG, with the same pixels on every machine.
    pub fn to_png(&self, title: &str) -> Vec<u8> {
        let pixels = raster::render(&self.draw(title), raster::SCALE);
        raster::png(pixels.width, pixels.height, &pixels.rgb)
    }

    fn draw(&self, title: &str) -> Drawing {
        match self {
            Plot::Table(table) => pictures::table(table, title),
            Plot::Histogram(histogram) => curves::histogram(histogram, title),
            Plot::Images(images) => pictures::images(images, title),
            Plot::Bars(bars) => curves::bars(bars, title),
            Plot::Xy(chart) => curves::xy(chart, title),
            Plot::Heatmap(chart) => heatmap::heatmap(chart, title),
            Plot::Confusion(confusion) => {
                heatmap::heatmap(&heatmap::of_confusion(confusion), title)
            }
            Plot::Clustermap(map) => heatmap::clustermap(map, title),
            Plot::Frames(frames) => heatmap::stills(frames, title),
        }
    }
}
