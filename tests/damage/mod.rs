//! Damaged copies of files, the same for the same seed.

// Each test file uses a part of this.
#![allow(dead_code)]

/// Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is at least 1.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// A place in `length` bytes, every second time near one of the ends, where headers and directories are.
    fn place(&mut self, length: usize) -> usize {
        let near = length.clamp(1, 160);
        match self.below(4) {
            0 => self.below(near),
            1 => length.max(1) - 1 - self.below(near),
            _ => self.below(length.max(1)),
        }
    }
}

/// A copy of `bytes` with one to four pieces of damage: flipped bits, bytes and whole numbers replaced by odd ones, digits
/// changed, parts cut out, repeated, put in or cut off.
pub(crate) fn damaged(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut copy = bytes.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.place(copy.len());
        let length = 1 + random.below(24);
        let end = (at + length).min(copy.len());
        match random.below(10) {
            0 | 1 => overwrite(&mut copy, at, &[bytes.get(at).copied().unwrap_or(0) ^ (1 << random.below(8))]),
            2 => {
                let odd = random.pick(&[0, 1, 0x7f, 0x80, 0xff, b'"', b'\'', b',', b'\n', b'{', b'[', b'-']);
                overwrite(&mut copy, at, &[odd]);
            }
            3 => {
                let odd = random.pick(&[0, u64::MAX, 1 << 63, (1 << 63) - 1, 1 << 32, 1 << 20, copy.len() as u64]);
                let kept = random.pick(&[2, 4, 8]);
                overwrite(&mut copy, at, &odd.to_le_bytes()[..kept]);
            }
            4 | 5 => change_digit(&mut copy, at, random),
            6 => drop(copy.drain(at.min(end)..end)),
            7 => {
                let piece = copy[at.min(end)..end].to_vec();
                copy.splice(at.min(end)..at.min(end), piece);
            }
            8 => {
                let piece: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
                copy.splice(end..end, piece);
            }
            _ => copy.truncate(if random.below(4) == 0 { at } else { copy.len() }),
        }
    }
    copy
}

fn overwrite(bytes: &mut [u8], at: usize, with: &[u8]) {
    for (place, &byte) in bytes.iter_mut().skip(at).zip(with) {
        *place = byte;
    }
}

/// The first digit from `at` on becomes another one, or a very large or a negative number.
fn change_digit(bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
    let Some(offset) = bytes.iter().skip(at).position(u8::is_ascii_digit) else { return };
    let digit = at + offset;
    let with = match random.below(4) {
        0 => b"18446744073709551615".to_vec(),
        1 => b"-1".to_vec(),
        _ => vec![b'0' + random.below(10) as u8],
    };
    bytes.splice(digit..=digit, with);
}

/// A `.npy` file of version 1.
pub(crate) fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.bytes());
    file.extend(data);
    file
}

/// A zip archive of these entries.
pub(crate) fn zip(entries: &[(&str, &[u8])], method: zip::CompressionMethod) -> Vec<u8> {
    use std::io::Write;
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(method);
    for (name, bytes) in entries {
        writer.start_file(*name, options).expect("a short name");
        writer.write_all(bytes).expect("memory to write to");
    }
    writer.finish().expect("memory to write to").into_inner()
}
