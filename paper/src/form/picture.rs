//! An SVG of `moeut-plot` as shapes: the few elements that it writes, and no others.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use roxmltree::{Document, Node};

/// What is wrong with an SVG: a bug here or in `moeut-plot`.
#[derive(Debug)]
pub(crate) struct Unreadable(pub(super) String);

impl Unreadable {
    /// As a sentence.
    pub(crate) fn why(&self) -> &str {
        &self.0
    }
}

impl<E: std::error::Error> From<E> for Unreadable {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// Red, green, blue, of 1 each.
pub(super) type Rgb = [f32; 3];

/// Shapes on a page. Lengths are in units of the SVG, from the upper left corner.
#[derive(Debug)]
pub(super) struct Picture {
    pub(super) width: f32,
    pub(super) height: f32,
    /// Later ones cover earlier ones.
    pub(super) shapes: Vec<Shape>,
}

#[derive(Debug)]
pub(super) struct Area {
    pub(super) x: f32,
    pub(super) y: f32,
    pub(super) width: f32,
    pub(super) height: f32,
}

/// How a path is painted.
#[derive(Debug)]
pub(super) enum Paint {
    Fill { color: Rgb, opacity: f32 },
    Stroke { color: Rgb, width: f32 },
}

#[derive(Debug)]
pub(super) enum Shape {
    Box(Area, Paint),
    /// Straight lines from point to point; what is filled is closed.
    Path(Vec<(f32, f32)>, Paint),
    Dot {
        x: f32,
        y: f32,
        radius: f32,
        paint: Paint,
    },
    Text(Text),
    /// A PNG.
    Image(Area, Vec<u8>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A line of text on its baseline.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) x: f32,
    pub(super) y: f32,
    pub(super) size: f32,
    pub(super) anchor: Anchor,
    /// Degrees clockwise around its place.
    pub(super) turn: f32,
    pub(super) fill: Rgb,
    pub(super) content: String,
}

impl Picture {
    /// Reads a document.
    pub(super) fn read(svg: &str) -> Result<Self, Unreadable> {
        let document = Document::parse(svg)?;
        let root = document.root_element();
        let elements = root.children().filter(Node::is_element);
        Ok(Self {
            width: number(root, "width")?,
            height: number(root, "height")?,
            shapes: elements.map(shape).collect::<Result<_, _>>()?,
        })
    }
}

fn shape(node: Node) -> Result<Shape, Unreadable> {
    Ok(match node.tag_name().name() {
        "rect" => Shape::Box(area(node)?, paint(node)?),
        "polyline" | "polygon" => Shape::Path(points(attribute(node, "points")?)?, paint(node)?),
        "circle" => Shape::Dot {
            x: number(node, "cx")?,
            y: number(node, "cy")?,
            radius: number(node, "r")?,
            paint: paint(node)?,
        },
        "text" => Shape::Text(text(node)?),
        "image" => {
            let data = attribute(node, "href")?.strip_prefix("data:image/png;base64,");
            let data = data.ok_or_else(|| Unreadable("an image is no PNG".to_owned()))?;
            Shape::Image(area(node)?, STANDARD.decode(data)?)
        }
        name => return Err(Unreadable(format!("the element `{name}` is unknown"))),
    })
}

/// Reads a text element.
pub(super) fn text(node: Node) -> Result<Text, Unreadable> {
    let turn = match node.attribute("transform") {
        None => 0.0,
        Some(transform) => {
            let turn = transform
                .strip_prefix("rotate(")
                .and_then(|rest| rest.split(' ').next());
            turn.ok_or_else(|| Unreadable(format!("`{transform}` is no rotation")))?
                .parse()?
        }
    };
    Ok(Text {
        x: number(node, "x")?,
        y: number(node, "y")?,
        size: number(node, "font-size")?,
        anchor: match node.attribute("text-anchor") {
            None => Anchor::Start,
            Some("middle") => Anchor::Middle,
            Some("end") => Anchor::End,
            Some(other) => return Err(Unreadable(format!("the anchor `{other}` is unknown"))),
        },
        turn,
        fill: color(attribute(node, "fill")?)?,
        content: node.text().unwrap_or_default().to_owned(),
    })
}

fn paint(node: Node) -> Result<Paint, Unreadable> {
    if let Some(stroke) = node.attribute("stroke") {
        return Ok(Paint::Stroke {
            color: color(stroke)?,
            width: number(node, "stroke-width")?,
        });
    }
    Ok(Paint::Fill {
        color: color(attribute(node, "fill")?)?,
        opacity: node.attribute("fill-opacity").map_or(Ok(1.0), str::parse)?,
    })
}

fn area(node: Node) -> Result<Area, Unreadable> {
    let or_zero = |name| node.attribute(name).map_or(Ok(0.0), str::parse::<f32>);
    Ok(Area {
        x: or_zero("x")?,
        y: or_zero("y")?,
        width: number(node, "width")?,
        height: number(node, "height")?,
    })
}

fn attribute<'a>(node: Node<'a, '_>, name: &str) -> Result<&'a str, Unreadable> {
    let missing = || Unreadable(format!("`{}` has no `{name}`", node.tag_name().name()));
    node.attribute(name).ok_or_else(missing)
}

fn number(node: Node, name: &str) -> Result<f32, Unreadable> {
    Ok(attribute(node, name)?.parse()?)
}

fn points(text: &str) -> Result<Vec<(f32, f32)>, Unreadable> {
    let point = |pair: &str| {
        let (x, y) = pair
            .split_once(',')
            .ok_or_else(|| Unreadable(format!("`{pair}` is no point")))?;
        Ok((x.parse()?, y.parse()?))
    };
    text.split(' ').map(point).collect()
}

/// `#rrggbb`.
fn color(text: &str) -> Result<Rgb, Unreadable> {
    let digits = text.strip_prefix('#').filter(|digits| digits.len() == 6);
    let digits = digits.ok_or_else(|| Unreadable(format!("`{text}` is no colour")))?;
    let number = u32::from_str_radix(digits, 16)?;
    let [_, red, green, blue] = number.to_be_bytes();
    Ok([red, green, blue].map(|part| f32::from(part) / 255.0))
}
