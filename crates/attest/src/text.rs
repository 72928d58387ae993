//! How people write bytes.

use p384::elliptic_curve::subtle::ConstantTimeEq as _;

/// Bytes in a challenge.
pub const CHALLENGE: usize = 64;

/// Lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of an even number of hexadecimal digits.
#[must_use]
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
    let digits = digits?;
    (digits.len() % 2 == 0).then(|| digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

/// Bytes of base64 with its standard alphabet; white space is skipped, padding may be left out.
#[must_use]
pub fn unbase64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut bits, mut count, mut padding) = (0u32, 0, 0);
    for c in text.bytes().filter(|c| !c.is_ascii_whitespace()) {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' if padding < 2 => {
                padding += 1;
                continue;
            }
            _ => return None,
        };
        if padding != 0 {
            return None;
        }
        bits = (bits << 6 | u32::from(value)) & 0x3FFF;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xFF) as u8);
        }
    }
    // What is left over is less than a digit, and zero.
    (count < 6 && bits & ((1 << count) - 1) == 0).then_some(bytes)
}

/// A string of at most 64 bytes as people give it: hexadecimal digits if there is an even number of them and nothing
/// else, otherwise text; `hex:`, `text:` and `base64:` say which it is. Filled up with zeroes.
///
/// # Errors
/// What is wrong with it, for people.
pub fn sixty_four(text: &str) -> Result<[u8; CHALLENGE], String> {
    let no = |what: &str| format!("{text:?} is no {what}");
    let bytes = if let Some(digits) = text.strip_prefix("hex:") {
        unhex(digits).ok_or_else(|| no("hexadecimal number"))?
    } else if let Some(text) = text.strip_prefix("text:") {
        text.as_bytes().to_vec()
    } else if let Some(digits) = text.strip_prefix("base64:") {
        unbase64(digits).ok_or_else(|| no("base64"))?
    } else {
        unhex(text).filter(|bytes| !bytes.is_empty()).unwrap_or_else(|| text.as_bytes().to_vec())
    };
    let mut padded = [0; CHALLENGE];
    padded
        .get_mut(..bytes.len())
        .ok_or_else(|| format!("{text:?} has {} bytes, more than {CHALLENGE}", bytes.len()))?
        .copy_from_slice(&bytes);
    Ok(padded)
}

/// The bytes of a token's file: as it is, base64, or hexadecimal.
#[must_use]
pub fn token_bytes(file: &[u8]) -> Vec<u8> {
    // A token begins with a CBOR tag, which is no character.
    let text = match std::str::from_utf8(file) {
        Ok(text) => text.trim(),
        Err(_) => return file.to_vec(),
    };
    unhex(text).filter(|bytes| !bytes.is_empty()).or_else(|| unbase64(text)).unwrap_or_else(|| file.to_vec())
}

/// Whether two strings of bytes are the same.
pub(crate) fn same(a: &[u8], b: &[u8]) -> bool {
    a.ct_eq(b).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (text, bytes) in [
            ("", &b""[..]),
            ("Zg==", b"f"),
            ("Zg", b"f"),
            ("Zm8=", b"fo"),
            ("Zm9v\nYmFy", b"foobar"),
            ("+/8=", &[0xFB, 0xFF]),
        ] {
            assert_eq!(unbase64(text).as_deref(), Some(bytes), "{text}");
        }
        for text in ["Z", "Zh==", "Zg===", "Z=g=", "Zm9vYmF-"] {
            assert_eq!(unbase64(text), None, "{text}");
        }
    }

    #[test]
    fn a_nonce_is_hexadecimal_if_it_can_be() {
        let first = |text: &str| sixty_four(text).unwrap()[..4].to_vec();
        assert_eq!(first("c0ffee00"), [0xC0, 0xFF, 0xEE, 0]);
        assert_eq!(first("text:c0ff"), *b"c0ff");
        assert_eq!(first("abc"), *b"abc\0");
        assert_eq!(first("hex:C0"), [0xC0, 0, 0, 0]);
        assert_eq!(first("base64:/w=="), [0xFF, 0, 0, 0]);
        assert!(sixty_four(&"ab".repeat(65)).is_err());
        assert!(sixty_four("hex:abc").is_err());
    }
}
