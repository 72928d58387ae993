//! Who vouches for a platform: the keys that sign platform tokens.

use p384::ecdsa::VerifyingKey;

use crate::text::{unbase64, unhex};

/// The public half of kvm-realm's development root, as an uncompressed point.
///
/// Anybody can derive its private half: what it signs may be true, but proves nothing about a real machine.
pub const DEVELOPMENT: [u8; 97] = *include_bytes!("development-root.sec1");

/// A key that is trusted to sign platform tokens.
#[derive(Debug, Clone)]
pub struct Root {
    /// What it is called.
    pub name: String,
    /// Whether everybody knows the private half.
    pub development: bool,
    pub(crate) key: VerifyingKey,
}

impl Root {
    /// A P-384 public key: a point (97 bytes, or 49 compressed), or a DER SubjectPublicKeyInfo of one.
    #[must_use]
    pub fn new(name: &str, bytes: &[u8]) -> Option<Self> {
        // id-ecPublicKey, secp384r1, then the point.
        const INFO: [u8; 23] = [
            0x30, 0x76, 0x30, 0x10, 0x06, 0x07, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x02, 0x01, 0x06, 0x05, 0x2B,
            0x81, 0x04, 0x00, 0x22, 0x03, 0x62, 0x00,
        ];
        let point = bytes.strip_prefix(&INFO).unwrap_or(bytes);
        let key = VerifyingKey::from_sec1_bytes(point).ok()?;
        let development = key.to_encoded_point(false).as_bytes() == DEVELOPMENT;
        let name = if development { "development root (its private key is public)" } else { name };
        Some(Self { name: name.to_owned(), development, key })
    }

    /// kvm-realm's development root.
    #[must_use]
    pub fn development() -> Option<Self> {
        Self::new("", &DEVELOPMENT)
    }

    /// A key from a file: PEM ("PUBLIC KEY"), DER, a point as bytes, hexadecimal or base64.
    #[must_use]
    pub fn from_file(name: &str, file: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(file).unwrap_or("").trim();
        let body = text
            .strip_prefix("-----BEGIN PUBLIC KEY-----")
            .and_then(|text| text.strip_suffix("-----END PUBLIC KEY-----"));
        match body {
            Some(body) => Self::new(name, &unbase64(body)?),
            None => Self::new(name, file)
                .or_else(|| Self::new(name, &unhex(text)?))
                .or_else(|| Self::new(name, &unbase64(text)?)),
        }
    }
}
