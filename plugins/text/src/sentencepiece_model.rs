//! What a SentencePiece model file says, read before the C++ library sees it.
//!
//! The library trusts its files: a rule trie that points outside itself, or more nested rules than its fixed arrays
//! hold, makes it read foreign memory. [`check`] refuses those, and finds the bytes at which text may be cut without
//! changing its ids, see [`Cuts`]. It is not a second implementation: nothing is encoded here.

use std::collections::HashMap;

/// Stands for a space in pieces.
pub(crate) const SPACE: char = '▁';

/// Rules whose keys are prefixes of each other, of which the library has room for so many.
const MAX_NESTED_RULES: usize = 32;
/// The same for user-defined pieces.
const MAX_NESTED_PIECES: usize = 64;
/// A rule replaces a few characters; a longer key only makes checking slow.
const MAX_RULE_BYTES: usize = 128;

/// The ASCII bytes at which a text falls into words that are encoded independently.
///
/// `encode(a + cut + b) = encode(a) ++ encode(b)` for all texts without [`SPACE`] holds because of all of these, which
/// [`check`] reads off the file; a model of which one is not true has no cuts:
/// - the cut is normalized to one space, whatever stands beside it: no rule's key has it among other bytes;
/// - runs of spaces are collapsed, spaces at both ends are removed, and a word gets one [`SPACE`] in front, be it the
///   first or not; no rule produces that sign;
/// - pieces are merged in pairs (BPE), and no piece has a [`SPACE`] behind its first character, so no merge crosses one;
/// - the [`SPACE`] is a piece: the library makes one unknown of a run of them, and a run then ends at each word;
/// - there are no user-defined pieces, which are taken first, and no unused ones, whose replacement depends on which
///   word was seen last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cuts([bool; 128]);

impl Cuts {
    /// The words between cuts, empty ones among them.
    pub(crate) fn words<'a>(&self, text: &'a str) -> impl Iterator<Item = &'a str> {
        text.split(move |c: char| c.is_ascii() && self.0[c as usize])
    }

    fn of(model: &Model<'_>, rules: &Rules) -> Option<Self> {
        let normalizer = &model.normalizer;
        let is_plain = model.is_bpe
            && !model.has_space_behind
            && normalizer.adds_space
            && normalizer.collapses_spaces
            && normalizer.escapes_spaces;
        let pieces_stay_within_words = model.pieces.iter().all(|piece| {
            !matches!(piece.kind, Kind::UserDefined | Kind::Unused)
                && !piece.text.chars().skip(1).any(|c| c == SPACE)
        });
        let space_is_a_piece = model
            .pieces
            .iter()
            .any(|piece| piece.kind == Kind::Normal && piece.text.chars().eq([SPACE]));
        if !is_plain || !pieces_stay_within_words || !space_is_a_piece || rules.makes_sign {
            return None;
        }
        let is_cut = |byte: usize| rules.becomes_space[byte] && !rules.is_in_longer_key[byte];
        Some(Self(std::array::from_fn(is_cut)))
    }
}

/// Reads a model file; what is wrong with it, or where text may be cut.
pub(crate) fn check(bytes: &[u8]) -> Result<Option<Cuts>, String> {
    let model = Model::read(bytes)?;
    model.check_pieces()?;
    let rules = model.normalizer.rules()?;
    model.denormalizer.rules()?;
    Ok(Cuts::of(&model, &rules))
}

/// The part of `ModelProto` that decides what encoding does.
struct Model<'a> {
    pieces: Vec<Piece<'a>>,
    is_bpe: bool,
    /// `treat_whitespace_as_suffix`
    has_space_behind: bool,
    normalizer: Normalizer<'a>,
    denormalizer: Normalizer<'a>,
}

struct Piece<'a> {
    text: &'a str,
    score: f32,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    UserDefined,
    Unused,
    /// Unknown, control or byte: never merged.
    Special,
}

#[derive(Clone, Copy)]
struct Normalizer<'a> {
    /// `add_dummy_prefix`
    adds_space: bool,
    /// `remove_extra_whitespaces`
    collapses_spaces: bool,
    /// `escape_whitespaces`
    escapes_spaces: bool,
    charsmap: &'a [u8],
}

impl<'a> Model<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let plain = Normalizer {
            adds_space: true,
            collapses_spaces: true,
            escapes_spaces: true,
            charsmap: &[],
        };
        let mut model = Self {
            pieces: Vec::new(),
            is_bpe: false,
            has_space_behind: false,
            normalizer: plain,
            denormalizer: plain,
        };
        for field in fields(bytes) {
            match field? {
                (1, Value::Bytes(piece)) => model.pieces.push(Piece::read(piece)?),
                (2, Value::Bytes(trainer)) => {
                    for field in fields(trainer) {
                        match field? {
                            (3, Value::Number(kind @ 1..=4)) => model.is_bpe = kind == 2,
                            (24, Value::Number(flag)) => model.has_space_behind = flag != 0,
                            (number @ (3 | 24), _) => return Err(odd("trainer_spec", number)),
                            _ => {}
                        }
                    }
                }
                (3, Value::Bytes(spec)) => model.normalizer.read(spec)?,
                (5, Value::Bytes(spec)) => model.denormalizer.read(spec)?,
                (number @ (1..=3 | 5), _) => return Err(odd("model", number)),
                _ => {}
            }
        }
        Ok(model)
    }

    fn check_pieces(&self) -> Result<(), String> {
        if self.pieces.is_empty() {
            return Err("it has no pieces".to_owned());
        }
        for (id, piece) in self.pieces.iter().enumerate() {
            if piece.text.is_empty() || piece.text.contains('\0') || !piece.score.is_finite() {
                let Piece { text, score, .. } = piece;
                return Err(format!("piece {id} is {text:?} with score {score}"));
            }
        }
        // Sorted, a text comes behind all its prefixes, and what is between them begins with them, too.
        let user_defined = self
            .pieces
            .iter()
            .filter(|piece| piece.kind == Kind::UserDefined);
        let mut sorted: Vec<&str> = user_defined.map(|piece| piece.text).collect();
        sorted.sort_unstable();
        let mut nested: Vec<&str> = Vec::new();
        for text in sorted {
            nested.retain(|prefix| text.starts_with(prefix));
            nested.push(text);
            if nested.len() > MAX_NESTED_PIECES {
                return Err(format!(
                    "more than {MAX_NESTED_PIECES} user-defined pieces begin each other"
                ));
            }
        }
        Ok(())
    }
}

impl<'a> Piece<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let mut piece = Self {
            text: "",
            score: 0.0,
            kind: Kind::Normal,
        };
        for field in fields(bytes) {
            match field? {
                (1, Value::Bytes(text)) => {
                    piece.text = str::from_utf8(text)
                        .map_err(|error| format!("a piece is not UTF-8: {error}"))?;
                }
                (2, Value::Fixed32(bits)) => piece.score = f32::from_bits(bits),
                (3, Value::Number(kind @ 1..=6)) => {
                    piece.kind = match kind {
                        1 => Kind::Normal,
                        4 => Kind::UserDefined,
                        5 => Kind::Unused,
                        _ => Kind::Special,
                    }
                }
                (number @ 1..=3, _) => return Err(odd("piece", number)),
                _ => {}
            }
        }
        Ok(piece)
    }
}

impl<'a> Normalizer<'a> {
    fn read(&mut self, bytes: &'a [u8]) -> Result<(), String> {
        for field in fields(bytes) {
            match field? {
                (2, Value::Bytes(charsmap)) => self.charsmap = charsmap,
                (3, Value::Number(flag)) => self.adds_space = flag != 0,
                (4, Value::Number(flag)) => self.collapses_spaces = flag != 0,
                (5, Value::Number(flag)) => self.escapes_spaces = flag != 0,
                (number @ 2..=5, _) => return Err(odd("normalizer_spec", number)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads the compiled map: the length of a trie in bytes, the trie, then texts that end with NUL.
    fn rules(&self) -> Result<Rules, String> {
        if self.charsmap.is_empty() {
            return Ok(Rules::none());
        }
        let (trie, outputs) = self
            .charsmap
            .split_first_chunk::<4>()
            .and_then(|(length, rest)| {
                rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)
            })
            .filter(|(trie, _)| !trie.is_empty() && trie.len().is_multiple_of(1024))
            .ok_or_else(|| damaged("the length of the trie"))?;
        let units = trie.as_chunks::<4>().0.iter();
        let mut walk = Walk {
            units: units.map(|unit| u32::from_le_bytes(*unit)).collect(),
            outputs,
            n_nested: HashMap::new(),
            rules: Rules::none(),
        };
        let root = walk.follow(0)?;
        walk.visit(root, 0)?;
        Ok(walk.rules)
    }
}

/// What matters here of the rules, each of which replaces the longest key that matches.
struct Rules {
    /// Bytes that are replaced by one space, or are one, as far as they stand alone.
    becomes_space: [bool; 256],
    /// Bytes of keys of two and more bytes.
    is_in_longer_key: [bool; 256],
    /// Whether some replacement has a [`SPACE`].
    makes_sign: bool,
}

impl Rules {
    fn none() -> Self {
        Self {
            becomes_space: std::array::from_fn(|byte| byte == usize::from(b' ')),
            is_in_longer_key: [false; 256],
            makes_sign: false,
        }
    }
}

/// A walk through a double-array trie, along the same steps as the library's, so that whatever it could reach is
/// checked. Keys with the same rest share the nodes of that rest; each is visited once.
struct Walk<'a> {
    /// In whole blocks of 256: a place within, with its last byte exchanged, is within, too.
    units: Vec<u32>,
    outputs: &'a [u8],
    /// For each node the most keys that end on one way down from it; none while the node is being visited.
    n_nested: HashMap<usize, Option<usize>>,
    rules: Rules,
}

impl Walk<'_> {
    /// The node that the unit at `place` leads to.
    fn follow(&self, place: usize) -> Result<usize, String> {
        let unit = self.units[place] as usize;
        let node = place ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6));
        (node < self.units.len())
            .then_some(node)
            .ok_or_else(|| damaged("the trie points outside itself"))
    }

    /// Visits what is below `node`, which lies behind `depth` bytes; returns its `n_nested`.
    fn visit(&mut self, node: usize, depth: usize) -> Result<usize, String> {
        if let Some(known) = self.n_nested.get(&node) {
            return known.ok_or_else(|| damaged("the trie goes in circles"));
        }
        if depth == MAX_RULE_BYTES {
            return Err(damaged("a key is too long"));
        }
        self.n_nested.insert(node, None);
        let mut most = 0;
        for byte in 0..=u8::MAX {
            let place = node ^ usize::from(byte);
            let unit = self.units[place];
            // A zero is a place that nothing was put into: a NUL in a text stays at this node.
            if unit & 0x8000_00ff != u32::from(byte) || unit == 0 {
                continue;
            }
            let next = self.follow(place)?;
            let n_below = self.visit(next, depth + 1)?;
            let is_end = unit & (1 << 8) != 0;
            if is_end {
                let output = self.output(next)?;
                let becomes_space = output == " ";
                self.rules.makes_sign |= output.contains(SPACE);
                if depth == 0 {
                    self.rules.becomes_space[usize::from(byte)] = becomes_space;
                }
            }
            if depth > 0 || n_below > 0 {
                self.rules.is_in_longer_key[usize::from(byte)] = true;
            }
            most = most.max(n_below + usize::from(is_end));
        }
        if most > MAX_NESTED_RULES {
            return Err(damaged("too many keys begin each other"));
        }
        self.n_nested.insert(node, Some(most));
        Ok(most)
    }

    /// The replacement for the key that ends at `node`.
    fn output(&self, node: usize) -> Result<&str, String> {
        usize::try_from(self.units[node] & 0x7fff_ffff)
            .ok()
            .and_then(|start| self.outputs.get(start..))
            .and_then(|rest| {
                rest.iter()
                    .position(|&byte| byte == 0)
                    .map(|end| &rest[..end])
            })
            .and_then(|output| str::from_utf8(output).ok())
            .ok_or_else(|| damaged("a replacement is missing or not UTF-8"))
    }
}

fn damaged(what: &str) -> String {
    format!("its normalization rules are damaged: {what}")
}

fn odd(message: &str, number: u32) -> String {
    format!("field {number} of `{message}` is not what SentencePiece writes there")
}

/// One value of a protobuf message.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
    Fixed64,
}

/// The fields of a protobuf message with their numbers; ends after the first error.
fn fields(mut bytes: &[u8]) -> impl Iterator<Item = Result<(u32, Value<'_>), String>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let field = next_field(&mut bytes);
        if field.is_none() {
            bytes = &[];
        }
        Some(field.ok_or_else(|| "it is not a protobuf message".to_owned()))
    })
}

fn next_field<'a>(bytes: &mut &'a [u8]) -> Option<(u32, Value<'a>)> {
    // More than 32 bits are cut off by the library, which would then see another field.
    let tag = u32::try_from(varint(bytes)?).ok()?;
    let value = match tag & 7 {
        0 => Value::Number(varint(bytes)?),
        1 => {
            bytes.split_off(..8)?;
            Value::Fixed64
        }
        2 => {
            let length = usize::try_from(varint(bytes)?).ok()?;
            Value::Bytes(bytes.split_off(..length)?)
        }
        5 => Value::Fixed32(u32::from_le_bytes(
            *bytes.split_off(..4)?.first_chunk::<4>()?,
        )),
        _ => return None,
    };
    Some((tag >> 3, value))
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.split_off_first()?;
        if shift == 63 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{sentencepiece::train_bpe, testing};

    /// A field of a protobuf message: its number, and a whole number or bytes.
    fn number(field: u8, value: u8) -> Vec<u8> {
        let number = u64::from(field) << 3;
        let mut bytes = varint_of(number);
        bytes.push(value);
        bytes
    }

    fn bytes(field: u8, value: &[u8]) -> Vec<u8> {
        let mut bytes = varint_of(u64::from(field) << 3 | 2);
        bytes.extend(varint_of(value.len() as u64));
        bytes.extend_from_slice(value);
        bytes
    }

    fn varint_of(mut value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while value >= 0x80 {
            bytes.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        bytes.push(value.to_le_bytes()[0]);
        bytes
    }

    fn piece(text: &str, kind: u8) -> Vec<u8> {
        bytes(1, &[bytes(1, text.as_bytes()), number(3, kind)].concat())
    }

    /// A model of the reference's settings. Fields behind it change it: protobuf joins messages that way.
    fn model() -> Vec<u8> {
        let documents = (0..100).map(|i| Ok::<_, crate::TextError>(testing::sentence(i)));
        train_bpe(documents, 40).unwrap()
    }

    fn check_with(more: &[u8]) -> Result<Option<Cuts>, String> {
        check(&[model(), more.to_owned()].concat())
    }

    #[test]
    fn the_references_models_are_cut_at_white_space() {
        let cuts = check(&model()).unwrap().unwrap();
        let words: Vec<&str> = cuts.words("a b\tc\nd\r\ne\u{a0}f\u{3000}g").collect();
        assert_eq!(words, ["a", "b", "c", "d", "", "e\u{a0}f\u{3000}g"]);
    }

    #[test]
    fn every_condition_of_the_cuts_is_checked() {
        for (what, more) in [
            ("unigram", bytes(2, &number(3, 1))),
            ("space behind", bytes(2, &number(24, 1))),
            ("no space in front", bytes(3, &number(3, 0))),
            ("runs of spaces", bytes(3, &number(4, 0))),
            ("bare spaces", bytes(3, &number(5, 0))),
            ("merge across words", piece("a▁b", 1)),
            ("user-defined piece", piece("ab", 4)),
            ("unused piece", piece("ab", 5)),
            ("a rule makes the sign", charsmap(&one_rule(b'a'), "▁")),
        ] {
            assert_eq!(check_with(&more), Ok(None), "{what}");
        }
        for (what, more) in [
            ("ordinary piece", piece("▁ab", 1)),
            ("a rule", charsmap(&one_rule(b'a'), "b")),
        ] {
            assert!(check_with(&more).unwrap().is_some(), "{what}");
        }
    }

    #[test]
    fn the_space_must_be_a_piece() {
        let spec = bytes(2, &number(3, 2));
        let without = [piece("<unk>", 2), piece("a", 1), spec].concat();
        assert_eq!(check(&without), Ok(None));
        assert!(check(&[piece("▁", 1), without].concat()).unwrap().is_some());
    }

    #[test]
    fn a_byte_that_a_rule_has_among_others_is_no_cut() {
        // `ab` becomes `c`, and so the text is not cut at a byte of it, whatever that byte alone becomes.
        for (first, second, is_cut) in
            [(b'a', b'b', true), (b' ', b'b', false), (b'a', b' ', false)]
        {
            let mut units = blank();
            units[0] = unit(0, 256, false);
            units[256 ^ usize::from(first)] = unit(first, 256, false);
            units[usize::from(first ^ second)] = unit(second, 256, true);
            // The second unit leads to the text at 0.
            let place = 256 ^ usize::from(first ^ second);
            units[place] = 0x8000_0000;
            let cuts = check_with(&charsmap(&units, "c")).unwrap().unwrap();
            assert_eq!(cuts.0[usize::from(b' ')], is_cut, "{first} {second}");
        }
    }

    #[test]
    fn files_that_mislead_the_library_are_refused() {
        let nan = [&[2 << 3 | 5][..], &f32::NAN.to_le_bytes()].concat();
        let nested: Vec<u8> = (1..=65).flat_map(|n| piece(&"a".repeat(n), 4)).collect();
        let mut circle = blank();
        circle[0] = unit(0, 256, false);
        circle[usize::from(b'a') ^ 256] = unit(b'a', usize::from(b'a'), true);
        let mut outside = blank();
        outside[0] = unit(0, 512, false);
        for (why, more) in [
            ("is \"\" with score 0", bytes(1, &[])),
            ("is \"a\\0\" with score 0", piece("a\0", 1)),
            ("is \"\" with score NaN", bytes(1, &nan)),
            ("a piece is not UTF-8", bytes(1, &bytes(1, &[0xff]))),
            ("field 3 of `piece`", bytes(1, &number(3, 99))),
            ("field 3 of `trainer_spec`", bytes(2, &number(3, 0))),
            ("field 2 of `model`", number(2, 1)),
            ("user-defined pieces begin each other", nested),
            ("not a protobuf message", vec![0x0b]),
            ("not a protobuf message", vec![0xff; 11]),
            ("not a protobuf message", bytes(1, b"abc")[..4].to_owned()),
            // The number of the field has more bits than the library keeps: it would see field 1.
            ("not a protobuf message", varint_of(1 << 35 | 0x0a)),
            ("length of the trie", bytes(3, &bytes(2, b"abc"))),
            ("goes in circles", charsmap(&circle, "b")),
            ("points outside itself", charsmap(&outside, "b")),
            (
                "missing or not UTF-8",
                bytes(3, &bytes(2, &map_of(&one_rule(b'a'), b"b"))),
            ),
            (
                "missing or not UTF-8",
                bytes(3, &bytes(2, &map_of(&one_rule(b'a'), b"\xff\0"))),
            ),
        ] {
            let error = check_with(&more).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn long_keys_and_many_nested_ones_are_refused() {
        // A key of `a`s that ends, if at all, at every one of them.
        let chain = |n: usize, ends: bool| {
            let mut units = vec![0; 256 * (n + 2)];
            units[0] = unit(0, 256, false);
            for i in 1..=n {
                let place = (256 * i) ^ usize::from(b'a');
                let next = 256 * (i + 1);
                units[place] = unit(b'a', place ^ next, ends);
                units[next] = 0x8000_0000;
            }
            charsmap(&units, "b")
        };
        assert!(check_with(&chain(32, true)).is_ok());
        assert!(
            check_with(&chain(33, true))
                .unwrap_err()
                .contains("too many keys")
        );
        assert!(check_with(&chain(127, false)).is_ok());
        assert!(
            check_with(&chain(128, false))
                .unwrap_err()
                .contains("too long")
        );
    }

    /// Two blocks of a trie, where no place has a fitting label.
    fn blank() -> Vec<u32> {
        vec![0x8000_0000; 512]
    }

    fn unit(label: u8, offset: usize, is_end: bool) -> u32 {
        let offset = u32::try_from(offset).unwrap();
        let (coarse, shift) = if offset < 1 << 21 {
            (offset, 0)
        } else {
            (offset >> 8, 1 << 9)
        };
        coarse << 10 | shift | u32::from(is_end) << 8 | u32::from(label)
    }

    /// The byte is replaced by the text at 0.
    fn one_rule(byte: u8) -> Vec<u32> {
        let mut units = blank();
        units[0] = unit(0, 256, false);
        units[256 ^ usize::from(byte)] = unit(byte, 256, true);
        units
    }

    /// A normalizer with these rules.
    fn charsmap(units: &[u32], output: &str) -> Vec<u8> {
        bytes(
            3,
            &bytes(2, &map_of(units, &[output.as_bytes(), b"\0"].concat())),
        )
    }

    fn map_of(units: &[u32], outputs: &[u8]) -> Vec<u8> {
        let length = u32::try_from(units.len() * 4).unwrap();
        let trie = units.iter().flat_map(|unit| unit.to_le_bytes());
        let mut map: Vec<u8> = length.to_le_bytes().into_iter().chain(trie).collect();
        map.extend_from_slice(outputs);
        map
    }
}
