//! Protobuf messages, by hand: a library would bring a build step for little more than what is here.
//!
//! Who writes or reads a message knows its field numbers; a field that holds its default value may be left out.

/// A message under construction.
#[derive(Debug, Clone, Default)]
pub(super) struct Message(pub(super) Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.0.push(value.to_le_bytes()[0]);
    }

    fn key(&mut self, field: u32, wire_type: u32) {
        self.varint(u64::from(field << 3 | wire_type));
    }

    pub(super) fn integer(mut self, field: u32, value: u64) -> Self {
        self.key(field, 0);
        self.varint(value);
        self
    }

    pub(super) fn double(mut self, field: u32, value: f64) -> Self {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn float(mut self, field: u32, value: f32) -> Self {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Bytes, or a text.
    pub(super) fn bytes(mut self, field: u32, value: &[u8]) -> Self {
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }
}

/// What a field of a message holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Integer(u64),
    /// Bytes, a text, a message, or the four or eight bytes of a number of fixed size.
    Bytes(&'a [u8]),
}

/// The fields of a message with their numbers, up to the first that is malformed.
pub(super) fn fields(mut rest: &[u8]) -> impl Iterator<Item = (u64, Value<'_>)> {
    std::iter::from_fn(move || {
        let key = varint(&mut rest)?;
        let length = match key & 7 {
            0 => return Some((key >> 3, Value::Integer(varint(&mut rest)?))),
            1 => 8,
            2 => usize::try_from(varint(&mut rest)?).ok()?,
            5 => 4,
            _ => return None,
        };
        let (value, tail) = rest.split_at_checked(length)?;
        rest = tail;
        Some((key >> 3, Value::Bytes(value)))
    })
}

/// The first field of this number, if it holds bytes.
pub(super) fn bytes_of(message: &[u8], number: u64) -> Option<&[u8]> {
    fields(message).find_map(|field| match field {
        (found, Value::Bytes(bytes)) if found == number => Some(bytes),
        _ => None,
    })
}

/// The first field of this number, if it holds an integer.
pub(super) fn integer_of(message: &[u8], number: u64) -> Option<u64> {
    fields(message).find_map(|field| match field {
        (found, Value::Integer(value)) if found == number => Some(value),
        _ => None,
    })
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, tail) = rest.split_first()?;
        *rest = tail;
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

    #[test]
    fn what_is_written_is_read_back() {
        let inner = Message::default().bytes(200, b"inside");
        let message = Message::default()
            .integer(1, u64::MAX)
            .double(2, 0.5)
            .float(3, 0.25)
            .bytes(16, &inner.0);
        assert_eq!(integer_of(&message.0, 1), Some(u64::MAX));
        assert_eq!(bytes_of(&message.0, 2), Some(&0.5f64.to_le_bytes()[..]));
        assert_eq!(bytes_of(&message.0, 3), Some(&0.25f32.to_le_bytes()[..]));
        let found = bytes_of(&message.0, 16).unwrap();
        assert_eq!(bytes_of(found, 200), Some(&b"inside"[..]));
        assert_eq!(integer_of(&message.0, 2), None, "of another kind");
    }

    /// The example of the format's documentation: field 1 is 150.
    #[test]
    fn the_bytes_are_the_known_ones() {
        assert_eq!(Message::default().integer(1, 150).0, [0x08, 0x96, 0x01]);
    }

    #[test]
    fn a_cut_off_message_ends_early() {
        let message = Message::default().integer(1, 7).bytes(2, b"abc").0;
        for length in 0..message.len() {
            assert!(fields(&message[..length]).count() < 2, "{length}");
        }
        assert_eq!(fields(&[0xff; 20]).count(), 0);
    }
}
