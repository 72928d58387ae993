//! The forms in which distributions ship arm64 kernels: the Image itself, a gzipped Image, and the EFI "zboot"
//! executable with a compressed Image inside.

use std::io::Read;

use crate::{Error, Result};

/// No kernel is larger than this; a compressed one that claims to be is not decompressed further.
const MAX_IMAGE: u64 = 1 << 30;

const HEADER_SIZE: usize = 64;
const MAGIC: &[u8; 4] = b"ARM\x64";
const DEFAULT_TEXT_OFFSET: u64 = 0x8_0000;

/// A kernel, ready to be copied into the guest.
#[derive(Debug)]
pub struct Image {
    /// The file's bytes, decompressed.
    pub bytes: Vec<u8>,
    /// Where it wants to lie, from a 2 MiB boundary.
    pub text_offset: u64,
    /// How much memory it uses from there on.
    pub image_size: u64,
}

impl Image {
    /// Reads a kernel from a file's content, whichever form it has.
    pub fn parse(file: Vec<u8>) -> Result<Self> {
        let bytes = unpack(file)?;
        let header = bytes.get(..HEADER_SIZE).ok_or_else(|| bad("it is shorter than a header"))?;
        if &header[56..60] != MAGIC {
            return Err(bad("the magic number ARM\\x64 is missing"));
        }
        let (text_offset, image_size, flags) = (le64(header, 8), le64(header, 16), le64(header, 24));
        if flags & 1 != 0 {
            return Err(bad("it is big-endian"));
        }
        // Kernels before 3.17 left the size out and had one fixed offset.
        let text_offset = if image_size == 0 { DEFAULT_TEXT_OFFSET } else { text_offset };
        let len = u64::try_from(bytes.len()).map_err(|_| bad("it is too large"))?;
        if text_offset > MAX_IMAGE || image_size > MAX_IMAGE || text_offset % 4096 != 0 {
            return Err(bad("its header makes no sense"));
        }
        Ok(Self { text_offset, image_size: image_size.max(len), bytes })
    }
}

fn bad(why: &str) -> Error {
    Error::vmm(format!("the kernel is not an arm64 Image: {why}"))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

fn le32(bytes: &[u8], at: usize) -> usize {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    // A 32-bit number fits a usize on every machine this runs on.
    usize::try_from(u32::from_le_bytes(value)).unwrap_or(usize::MAX)
}

fn unpack(file: Vec<u8>) -> Result<Vec<u8>> {
    if file.starts_with(&[0x1f, 0x8b]) {
        return decompress("gzip", &file);
    }
    // EFI zboot: "MZ", then "zimg", the payload's offset and size, and the compression's name.
    if file.len() >= HEADER_SIZE && file.starts_with(b"MZ") && &file[4..8] == b"zimg" {
        let (offset, size) = (le32(&file, 8), le32(&file, 12));
        let name = file[24..56].split(|byte| *byte == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).map_err(|_| bad("its compression has no readable name"))?;
        let payload = offset
            .checked_add(size)
            .and_then(|end| file.get(offset..end))
            .ok_or_else(|| bad("its compressed part lies outside the file"))?;
        return decompress(name, payload);
    }
    Ok(file)
}

fn decompress(name: &str, mut payload: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let failed =
        |error: &dyn std::fmt::Display| bad(&format!("its {name} part cannot be decompressed: {error}"));
    match name {
        "gzip" => {
            let decoder = flate2::read::GzDecoder::new(payload);
            decoder.take(MAX_IMAGE).read_to_end(&mut bytes).map_err(|error| failed(&error))?;
        }
        "zstd" | "zstd22" => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(payload).map_err(|error| failed(&error))?;
            decoder.take(MAX_IMAGE).read_to_end(&mut bytes).map_err(|error| failed(&error))?;
        }
        "xzkern" | "xz" => {
            lzma_rs::xz_decompress(&mut payload, &mut bytes)
                .map_err(|error| failed(&format!("{error:?}")))?;
        }
        other => return Err(bad(&format!("its compression \"{other}\" is unknown"))),
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image() -> Vec<u8> {
        let mut bytes = vec![0; 5000];
        bytes[16..24].copy_from_slice(&0x28_0000u64.to_le_bytes());
        bytes[24..32].copy_from_slice(&0xau64.to_le_bytes());
        bytes[56..60].copy_from_slice(MAGIC);
        bytes[4999] = 7;
        bytes
    }

    fn gzipped() -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&image()).unwrap();
        encoder.finish().unwrap()
    }

    fn zboot(name: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 512];
        file[..2].copy_from_slice(b"MZ");
        file[4..8].copy_from_slice(b"zimg");
        file[8..12].copy_from_slice(&512u32.to_le_bytes());
        file[12..16].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        file[24..24 + name.len()].copy_from_slice(name);
        file.extend_from_slice(payload);
        file.extend_from_slice(b"trailer");
        file
    }

    #[test]
    fn an_image_says_how_much_memory_it_needs() {
        let parsed = Image::parse(image()).unwrap();
        assert_eq!((parsed.text_offset, parsed.image_size), (0, 0x28_0000));
        assert_eq!(parsed.bytes, image());
    }

    #[test]
    fn gzip_and_zboot_lead_to_the_same_image() {
        assert_eq!(Image::parse(gzipped()).unwrap().bytes, image());
        assert_eq!(Image::parse(zboot(b"gzip", &gzipped())).unwrap().bytes, image());
        let mut zstd = Vec::new();
        ruzstd::encoding::compress(&image()[..], &mut zstd, ruzstd::encoding::CompressionLevel::Fastest);
        assert_eq!(Image::parse(zboot(b"zstd", &zstd)).unwrap().bytes, image());
        let mut xz = Vec::new();
        lzma_rs::xz_compress(&mut &image()[..], &mut xz).unwrap();
        assert_eq!(Image::parse(zboot(b"xzkern", &xz)).unwrap().bytes, image());
    }

    #[test]
    fn what_is_not_a_kernel_is_refused() {
        let mut outside = zboot(b"gzip", &gzipped());
        outside[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut big_endian = image();
        big_endian[24] = 1;
        let mut wild = image();
        wild[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        for file in
            [vec![], vec![0; 64], zboot(b"lzo", b"x"), zboot(b"gzip", b"x"), outside, big_endian, wild]
        {
            assert!(Image::parse(file).is_err());
        }
    }
}
