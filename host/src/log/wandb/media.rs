//! Texts and charts as W&B shows them: a small JSON object in a row of history, and files that it names.
//!
//! ```text
//! text        html             table     JSON, artifact    histogram   in the row itself, at most 512 bins
//! images      png              frames    video, gif        others      Plotly's JSON, or a png of what that cannot draw
//! ```
//! Files are below the run's folder `files`, named after metric, row and content, as W&B's own are.

use moeut_plot::{Histogram, Image, Plot, Table};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::super::path_of;

/// The most that W&B takes.
const MAX_BINS: usize = 512;

/// What stands in the row, and files with their paths below the folder `files`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Media {
    pub(super) json: Value,
    pub(super) files: Vec<(String, Vec<u8>)>,
}

/// What a value is called: the metric's name and the row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) name: &'a str,
    pub(super) row: u64,
}

/// A text, as it is.
pub(super) fn text(place: Place<'_>, text: &str) -> Media {
    let escaped = text
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    let html = escaped.replace('\n', "<br>\n");
    place.file("html", "html-file", "html", html.into_bytes(), json!({}))
}

/// A chart.
pub(super) fn plot(place: Place<'_>, plot: &Plot) -> Media {
    match plot {
        Plot::Table(table) => place.table(table),
        Plot::Histogram(histogram) => Media {
            json: bins(histogram),
            files: Vec::new(),
        },
        Plot::Images(images) => place.images(images),
        Plot::Frames(frames) => {
            place.file("videos", "video-file", "gif", frames.to_gif(), json!({}))
        }
        Plot::Bars(_)
        | Plot::Xy(_)
        | Plot::Heatmap(_)
        | Plot::Confusion(_)
        | Plot::Clustermap(_) => match plot.to_plotly(place.name) {
            Some(figure) => {
                let bytes = figure.to_string().into_bytes();
                place.file("plotly", "plotly-file", "plotly.json", bytes, json!({}))
            }
            None => place.png(plot.to_png(place.name), json!({})),
        },
    }
}

impl Place<'_> {
    /// A file of its own, with `more` about it.
    fn file(self, folder: &str, kind: &str, extension: &str, bytes: Vec<u8>, more: Value) -> Media {
        use std::fmt::Write;
        let hash = Sha256::digest(&bytes);
        let hash = hash.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        let (name, row) = (path_of(self.name), self.row);
        let path = format!("media/{folder}/{name}_{row}_{}.{extension}", &hash[..20]);
        let mut json = json!({"_type": kind, "path": path, "sha256": hash, "size": bytes.len()});
        if let (Value::Object(json), Value::Object(more)) = (&mut json, more) {
            json.extend(more);
        }
        Media {
            json,
            files: vec![(path, bytes)],
        }
    }

    fn table(self, table: &Table) -> Media {
        let cell = json!({"wb_type": "union", "params": {"allowed_types": [{"wb_type": "none"}, {"wb_type": "string"}]}});
        let types = table.header.iter().map(|name| (name.clone(), cell.clone()));
        let types: serde_json::Map<String, Value> = types.collect();
        // Who reads the artifact wants all of it, who reads the file the first two.
        let content = json!({
            "columns": table.header,
            "data": table.rows,
            "_type": "table",
            "column_types": {"wb_type": "typedDict", "params": {"type_map": types}},
            "log_mode": "IMMUTABLE",
            "ncols": table.header.len(),
            "nrows": table.rows.len(),
        })
        .to_string();
        let size = json!({"ncols": table.header.len(), "nrows": table.rows.len()});
        self.file(
            "table",
            "table-file",
            "table.json",
            content.into_bytes(),
            size,
        )
    }

    fn png(self, bytes: Vec<u8>, more: Value) -> Media {
        let mut media = self.file("images", "image-file", "png", bytes, more);
        media.json["format"] = "png".into();
        media
    }

    fn images(self, images: &[Image]) -> Media {
        let one = |image: &Image| {
            let mut about = json!({"width": image.width, "height": image.height});
            if !image.caption.is_empty() {
                about["caption"] = image.caption.as_str().into();
            }
            self.png(image.to_png(), about)
        };
        let all: Vec<Media> = images.iter().map(one).collect();
        if let [only] = &all[..] {
            return only.clone();
        }
        let first = images.first();
        let paths = all.iter().map(|media| media.json["path"].clone());
        let captions = images.iter().map(|image| image.caption.as_str());
        Media {
            json: json!({
                "_type": "images/separated",
                "width": first.map(|image| image.width),
                "height": first.map(|image| image.height),
                "format": "png",
                "count": images.len(),
                "filenames": paths.collect::<Vec<_>>(),
                "captions": captions.collect::<Vec<_>>(),
            }),
            files: all.into_iter().flat_map(|media| media.files).collect(),
        }
    }
}

/// Neighbouring bins are joined until there are not too many.
fn bins(histogram: &Histogram) -> Value {
    let width = histogram.counts.len().div_ceil(MAX_BINS).max(1);
    let counts: Vec<u64> = histogram
        .counts
        .chunks(width)
        .map(|chunk| chunk.iter().sum())
        .collect();
    let mut edges: Vec<f64> = histogram.edges.iter().copied().step_by(width).collect();
    if edges.len() == counts.len() {
        edges.extend(histogram.edges.last());
    }
    json!({"_type": "histogram", "values": counts, "bins": edges})
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place<'_> = Place {
        name: "a/b",
        row: 7,
    };

    #[test]
    fn a_text_is_shown_as_it_is() {
        let media = text(PLACE, "a < b & c\nd");
        let (path, bytes) = &media.files[0];
        assert_eq!(bytes, b"a &lt; b &amp; c<br>\nd");
        assert!(path.starts_with("media/html/a/b_7_"), "{path}");
        assert_eq!(media.json["path"], path.as_str());
        assert_eq!(media.json["size"], bytes.len());
        // `sha256sum` of those bytes.
        assert_eq!(media.json["sha256"], HASH);
    }

    const HASH: &str = "86f30864963552c9c3a9b94ec03f852ee2d84a3eafe654badd9d2c3f92109e95";

    #[test]
    fn a_table_keeps_its_shape() {
        let table = Table {
            header: vec!["k".to_owned(), "v".to_owned()],
            rows: vec![vec!["x".to_owned(), "1".to_owned()]],
        };
        let media = plot(PLACE, &Plot::Table(table));
        let content: Value = serde_json::from_slice(&media.files[0].1).unwrap();
        assert_eq!(
            (&content["columns"], &content["data"]),
            (&json!(["k", "v"]), &json!([["x", "1"]]))
        );
        let types = &content["column_types"]["params"]["type_map"];
        assert_eq!(types.as_object().unwrap().len(), 2);
        assert_eq!(
            (&media.json["ncols"], &media.json["nrows"]),
            (&2.into(), &1.into())
        );
    }

    #[test]
    fn bins_are_joined_and_no_value_is_lost() {
        for n_bins in [1, 64, MAX_BINS, MAX_BINS + 1, 3 * MAX_BINS - 1] {
            let histogram = Histogram {
                edges: (0..=n_bins).map(|edge| edge as f64).collect(),
                counts: vec![2; n_bins],
                sum: 0.0,
                sum_squares: 0.0,
                range: (0.0, 1.0),
            };
            let json = bins(&histogram);
            let counts = json["values"].as_array().unwrap();
            let edges = json["bins"].as_array().unwrap();
            assert!(counts.len() <= MAX_BINS);
            assert_eq!(edges.len(), counts.len() + 1);
            assert_eq!(
                counts.iter().map(|n| n.as_u64().unwrap()).sum::<u64>(),
                2 * n_bins as u64
            );
            assert_eq!(edges.last().unwrap(), &json!(n_bins as f64));
        }
    }

    fn image(caption: &str) -> Image {
        Image {
            width: 2,
            height: 1,
            rgb: vec![0; 6],
            caption: caption.to_owned(),
        }
    }

    #[test]
    fn one_image_is_a_file_and_several_are_a_list() {
        let media = plot(PLACE, &Plot::Images(vec![image("c")]));
        assert_eq!(media.json["_type"], "image-file");
        assert_eq!(media.json["caption"], "c");
        assert_eq!(media.json["width"], 2);
        let media = plot(PLACE, &Plot::Images(vec![image("c"), image("")]));
        assert_eq!(media.json["count"], 2);
        assert_eq!(media.json["captions"], json!(["c", ""]));
        let paths: Vec<&str> = media.files.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(media.json["filenames"], json!(paths));
    }
}
