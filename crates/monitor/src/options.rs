//! What the machine's user may tell the monitor at boot: texts of fw_cfg.

/// An address in hexadecimal, with `0x`; a byte of zero ends the text.
#[must_use]
pub fn address(text: &[u8]) -> Option<u64> {
    let text = text.split(|&byte| byte == 0).next()?;
    let digits = text.strip_prefix(b"0x")?;
    if digits.is_empty() || digits.len() > 16 {
        return None;
    }
    digits.iter().try_fold(0, |value, &byte| {
        let digit = char::from(byte).to_digit(16)?;
        Some(value << 4 | u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hexadecimal_and_nothing_else() {
        assert_eq!(address(b"0x50000000"), Some(0x5000_0000));
        assert_eq!(address(b"0xFFFFffff00000000\0\0"), Some(0xFFFF_FFFF_0000_0000));
        for wrong in [&b""[..], b"0x", b"50000000", b"0x5g", b"0x10000000000000000", b"\x000x5"] {
            assert_eq!(address(wrong), None);
        }
    }
}
