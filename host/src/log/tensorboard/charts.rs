//! Charts as the kinds of value that TensorBoard has a tab for.
//!
//! ```text
//! histogram   HistogramProto     tabs Histograms and Distributions
//! table       Markdown           tab Text
//! picture     the pixels, PNG    tab Images
//! animation   GIF                tab Images, which hands it to the browser as it is
//! all others  a drawing, PNG     tab Images
//! ```

use super::{Message, text_value};
use moeut_plot::{Histogram, Plot, Table};

/// Field numbers of `tensorflow.Summary.Value`.
const TAG: u32 = 1;
const IMAGE: u32 = 4;
const HISTOGRAM: u32 = 5;

/// The value of a chart. Several pictures are one in a grid, as in the reference.
pub(super) fn value(name: &str, plot: &Plot) -> Message {
    match plot {
        Plot::Table(table) => text_value(name, &markdown(table)),
        Plot::Histogram(histogram) => named(name).bytes(HISTOGRAM, &histogram_proto(histogram).0),
        Plot::Frames(frames) => image(name, &frames.to_gif()),
        Plot::Images(images) => match &images[..] {
            [single] => image(name, &single.to_png()),
            _ => image(name, &plot.to_png(name)),
        },
        Plot::Bars(_)
        | Plot::Xy(_)
        | Plot::Heatmap(_)
        | Plot::Confusion(_)
        | Plot::Clustermap(_) => image(name, &plot.to_png(name)),
    }
}

fn named(name: &str) -> Message {
    Message::default().bytes(TAG, name.as_bytes())
}

/// `tensorflow.Summary.Image`: height, width, three colours, the file.
fn image(name: &str, file: &[u8]) -> Message {
    let (width, height) = size(file).unwrap_or_default();
    let image = Message::default()
        .integer(1, height)
        .integer(2, width)
        .integer(3, 3)
        .bytes(4, file);
    named(name).bytes(IMAGE, &image.0)
}

/// Width and height, which both formats have at a fixed place near their beginning.
fn size(file: &[u8]) -> Option<(u64, u64)> {
    if file.starts_with(b"GIF") {
        let side = |at: usize| Some(u16::from_le_bytes(*file.get(at..)?.first_chunk()?));
        return Some((side(6)?.into(), side(8)?.into()));
    }
    let side = |at: usize| Some(u32::from_be_bytes(*file.get(at..)?.first_chunk()?));
    Some((side(16)?.into(), side(20)?.into()))
}

/// `tensorflow.HistogramProto`: smallest, largest, number, sum, sum of squares; upper ends and counts of the bins.
fn histogram_proto(histogram: &Histogram) -> Message {
    let n_values: u64 = histogram.counts.iter().sum();
    let limits = histogram.edges.iter().skip(1).copied();
    let counts = histogram.counts.iter().map(|&count| count as f64);
    Message::default()
        .double(1, histogram.range.0)
        .double(2, histogram.range.1)
        .double(3, n_values as f64)
        .double(4, histogram.sum)
        .double(5, histogram.sum_squares)
        .bytes(6, &packed(limits))
        .bytes(7, &packed(counts))
}

fn packed(numbers: impl Iterator<Item = f64>) -> Vec<u8> {
    numbers.flat_map(f64::to_le_bytes).collect()
}

/// A table of GitHub's dialect. A cell is one line, and its bars are no borders.
fn markdown(table: &Table) -> String {
    let n_cols = table.rows.iter().map(Vec::len).max().unwrap_or(0);
    let n_cols = n_cols.max(table.header.len());
    let line = |cells: &[String]| {
        let cells =
            (0..n_cols).map(|col| cells.get(col).map(|cell| escape(cell)).unwrap_or_default());
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let rule = format!("|{}\n", " --- |".repeat(n_cols));
    let rows = table.rows.iter().map(|row| line(row));
    [line(&table.header), rule]
        .into_iter()
        .chain(rows)
        .collect()
}

fn escape(cell: &str) -> String {
    cell.replace('|', "\\|").replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_stays_in_its_column() {
        let table = Table {
            header: vec!["a".to_owned(), "b".to_owned()],
            rows: vec![
                vec!["x|y".to_owned(), "two\nlines".to_owned()],
                vec!["1".to_owned()],
            ],
        };
        assert_eq!(
            markdown(&table),
            "| a | b |\n| --- | --- |\n| x\\|y | two lines |\n| 1 |  |\n"
        );
    }
}
