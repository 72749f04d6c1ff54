//! Reading and writing protobuf messages, as far as the ABI's functions need it: fields one after the other, without a schema.
//!
//! Groups are refused: proto3 has none. Nothing is copied, and every step takes at least one byte of the message, so that a
//! guest's message costs no more than its length.

/// A message that is not protobuf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the message is not protobuf")]
pub(crate) struct Malformed;

/// The value of a field as it stands on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    /// Numbers, truth values, enums.
    Varint(u64),
    /// `fixed64`, `double`.
    Fixed64(u64),
    /// Text, bytes, messages, packed lists.
    Bytes(&'a [u8]),
    /// `fixed32`, `float`.
    Fixed32(u32),
}

impl<'a> Value<'a> {
    /// The bytes of a length-delimited field; nothing for one of another kind.
    pub(crate) fn bytes(self) -> &'a [u8] {
        match self {
            Value::Bytes(bytes) => bytes,
            _ => &[],
        }
    }
}

/// The fields of a message in order, by number. Ends after the first error.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

/// Reads a message.
pub(crate) fn fields(message: &[u8]) -> Fields<'_> {
    Fields { rest: message }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.read();
        if field.is_none() {
            self.rest = &[];
        }
        Some(field.ok_or(Malformed))
    }
}

impl<'a> Fields<'a> {
    fn read(&mut self) -> Option<(u64, Value<'a>)> {
        let key = self.varint()?;
        // The field number is what is left of the key; there is no field 0.
        let number = Some(key >> 3).filter(|number| (1..1 << 29).contains(number))?;
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(u64::from_le_bytes(self.array()?)),
            2 => {
                let len = usize::try_from(self.varint()?).ok()?;
                let (bytes, rest) = self.rest.split_at_checked(len)?;
                self.rest = rest;
                Value::Bytes(bytes)
            }
            5 => Value::Fixed32(u32::from_le_bytes(self.array()?)),
            _ => return None,
        };
        Some((number, value))
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(*bytes)
    }
}

/// The length-delimited fields of a message by number; the last of a number counts, an absent one is empty.
pub(crate) fn length_delimited<const N: usize>(message: &[u8], numbers: [u64; N]) -> Result<[&[u8]; N], Malformed> {
    let mut found = [&[][..]; N];
    for field in fields(message) {
        let (number, value) = field?;
        if let Some(at) = numbers.iter().position(|wanted| *wanted == number) {
            found[at] = value.bytes();
        }
    }
    Ok(found)
}

/// Appends a length-delimited field, also an empty one.
pub(crate) fn push_bytes(out: &mut Vec<u8>, number: u32, contents: &[u8]) {
    push_varint(out, u64::from(number) << 3 | 2);
    push_varint(out, contents.len() as u64);
    out.extend_from_slice(contents);
}

/// Appends a field that holds a number or a truth value.
pub(crate) fn push_number(out: &mut Vec<u8>, number: u32, value: u64) {
    push_varint(out, u64::from(number) << 3);
    push_varint(out, value);
}

fn push_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(message: &[u8]) -> Result<Vec<(u64, Value<'_>)>, Malformed> {
        fields(message).collect()
    }

    #[test]
    fn reads_what_it_writes_and_passes_over_other_kinds() {
        let mut message = Vec::new();
        push_number(&mut message, 1, 300);
        push_bytes(&mut message, 20, &[7; 200]);
        push_bytes(&mut message, 3, b"");
        message.extend([4 << 3 | 1, 1, 0, 0, 0, 0, 0, 0, 0, 5 << 3 | 5, 2, 0, 0, 0]);
        let expected = [
            (1, Value::Varint(300)),
            (20, Value::Bytes(&[7; 200])),
            (3, Value::Bytes(b"")),
            (4, Value::Fixed64(1)),
            (5, Value::Fixed32(2)),
        ];
        assert_eq!(read(&message).unwrap(), expected);
    }

    #[test]
    fn refuses_what_is_cut_off_or_no_message() {
        let mut message = Vec::new();
        push_bytes(&mut message, 1, b"abc");
        for len in 1..message.len() {
            assert_eq!(read(&message[..len]), Err(Malformed), "{len} bytes");
        }
        for bad in [
            &[0x0b, 0x0c][..],                                                 // a group
            &[0x02, 0],                                                        // field 0
            &[0x80],                                                           // a key that goes on
            &[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1], // a number of 11 bytes
            &[0x0a, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1],           // longer than there is
        ] {
            assert_eq!(read(bad), Err(Malformed), "{bad:?}");
        }
    }
}
