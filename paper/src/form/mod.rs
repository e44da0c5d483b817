//! The forms in which a figure is printed: SVG with outlined letters, PDF with an embedded font, PNG.

mod font;
mod outlined;
mod pdf;
mod picture;

pub(crate) use outlined::outlined;
pub(crate) use pdf::pdf;
pub(crate) use picture::Unreadable;
