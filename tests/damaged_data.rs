//! Damaged and hostile data files, from the folder to batches and labels: tensors or one line that names the file, never a
//! panic, and never more memory than the files and a batch take. A process of its own, so that its memory can be looked at.

mod damage;

use std::io::Cursor;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use image::{ImageFormat, Rgb, RgbImage};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::TempDir;
use tsquant::config::{DataPlan, InputSource, InputsPlan, Transform};
use tsquant::dataset::{Dataset, Error};
use zip::CompressionMethod;

use damage::{Random, damaged, npy, zip};

/// More than all of this file's data at once, and than what libtorch takes by itself.
const MOST_MEMORY: u64 = 1 << 30;

/// Everything that a run reads of a data set.
fn read(path: &Path, inputs: &[&str], labels: &str) -> Result<usize, Error> {
    let plan = DataPlan {
        path: path.to_owned(),
        inputs: InputsPlan::Positional(inputs.iter().map(|&name| InputSource::Tensor(name.to_owned())).collect()),
        samples: None,
        shuffle: false,
        seed: 0,
        batch_size: NonZeroUsize::new(4).unwrap(),
        transform: Transform { scale: Some(0.5), ..Transform::default() },
    };
    let data = Dataset::open(&plan)?;
    // Damage may make an axis of size 1 a large one, and then there are as many batches.
    for batch in data.batches().take(20) {
        batch?;
    }
    data.first(usize::MAX)?;
    let _ = data.labels(labels)?;
    Ok(data.rows())
}

/// How many of the files tried were refused.
#[derive(Debug, Default)]
struct Count {
    tried: usize,
    refused: usize,
}

impl Count {
    /// Reads `path`, which `what` was done to.
    fn survives(&mut self, path: &Path, inputs: &[&str], labels: &str, what: &str) -> Option<String> {
        let result = catch_unwind(AssertUnwindSafe(|| read(path, inputs, labels)));
        let result = result.unwrap_or_else(|_| panic!("a panic: {}, {what}", path.display()));
        self.tried += 1;
        let line = result.err()?.to_string();
        self.refused += 1;
        let folder = path.parent().unwrap().to_str().unwrap();
        assert!(line.contains(folder), "expected the file's name in: {line} ({what})");
        assert!(!line.contains('\n') && line.len() < 4000, "expected one line of sane length: {line:?} ({what})");
        Some(line)
    }

    /// Reads a file of these bytes with a tensor `x`, which has to be refused, and returns the error.
    fn refuses(&mut self, path: &Path, bytes: impl AsRef<[u8]>, labels: &str, what: &str) -> String {
        fs_err::write(path, bytes).unwrap();
        self.survives(path, &["x"], labels, what).unwrap_or_else(|| panic!("not refused: {what}"))
    }

    /// Many damaged copies of a file that can be read.
    fn survives_damage(&mut self, path: &Path, data: &Path, inputs: &[&str], labels: &str, copies: u64) {
        let bytes = fs_err::read(path).unwrap();
        assert_eq!(self.survives(data, inputs, labels, "nothing"), None, "{}", path.display());
        for length in 0..bytes.len().min(700) {
            for cut in [length, bytes.len() - length] {
                fs_err::write(path, &bytes[..cut]).unwrap();
                self.survives(data, inputs, labels, &format!("cut to {cut} bytes"));
            }
        }
        for seed in 0..copies {
            fs_err::write(path, damaged(&bytes, &mut Random(seed))).unwrap();
            self.survives(data, inputs, labels, &format!("seed {seed}"));
        }
        fs_err::write(path, bytes).unwrap();
    }
}

fn peak_memory() -> u64 {
    let status = fs_err::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() * 1024
}

#[track_caller]
fn check_memory() {
    let peak = peak_memory();
    assert!(peak < MOST_MEMORY, "{peak} bytes of memory");
}

fn floats(count: usize) -> Vec<u8> {
    (0..count).flat_map(|index| (index as f32 / 7.0).to_le_bytes()).collect()
}

fn integers(count: i64) -> Vec<u8> {
    (0..count).flat_map(i64::to_le_bytes).collect()
}

fn safetensors_bytes() -> Vec<u8> {
    let (x, ids, mask, labels) = (floats(6 * 48), integers(30), [1; 6], integers(6));
    let view = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
    let tensors = [
        ("x", view(Dtype::F32, &[6, 3, 4, 4], &x)),
        ("ids", view(Dtype::I64, &[6, 5], &ids)),
        ("mask", view(Dtype::BOOL, &[6, 1], &mask)),
        ("labels", view(Dtype::I64, &[6], &labels)),
    ];
    safetensors::serialize(tensors, None).unwrap()
}

fn npz_bytes(method: CompressionMethod) -> Vec<u8> {
    let x = npy("<f4", "(6, 3, 4, 4)", &floats(6 * 48));
    let ids = npy("<i8", "(6, 5)", &integers(30));
    let labels = npy("<i8", "(6,)", &integers(6));
    zip(&[("x.npy", &x), ("ids.npy", &ids), ("labels.npy", &labels)], method)
}

const INPUTS: &[&str] = &["x", "ids"];

#[test]
fn damaged_safetensors_npz_and_npy_are_survived() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: Vec<u8>| {
        let path = folder.path().join(name);
        fs_err::write(&path, bytes).unwrap();
        path
    };
    let files: [(PathBuf, &[&str], &str); 4] = [
        (write("a.safetensors", safetensors_bytes()), &["x", "ids", "mask"], "labels"),
        (write("b.npz", npz_bytes(CompressionMethod::Stored)), INPUTS, "labels"),
        (write("c.npz", npz_bytes(CompressionMethod::Deflated)), INPUTS, "labels"),
        (write("d.npy", npy("<i8", "(6, 5)", &integers(30))), &["d"], "d"),
    ];
    for (path, inputs, labels) in &files {
        let mut count = Count::default();
        count.survives_damage(path, path, inputs, labels, 4000);
        println!("{}: {count:?}", path.file_name().unwrap().display());
        assert!(count.refused > count.tried / 4, "{count:?}");
    }
    check_memory();
}

/// A safetensors file with this header and `data` bytes behind it.
fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(std::iter::repeat_n(0, data));
    file
}

#[test]
fn safetensors_headers_that_promise_something_else_are_refused() {
    let tensor = |name: &str, dtype: &str, shape: &str, start: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let x = |shape: &str, start, end| format!("{{{}}}", tensor("x", "F32", shape, start, end));
    let most = u64::MAX;
    let mut headers = vec![
        x("[4294967296,4294967296]", 0, 96),
        x("[9223372036854775808,2]", 0, 0),
        x("[18446744073709551615]", 0, 96),
        x("[18446744073709551616]", 0, 96),
        x("[4611686018427387904,1,4]", 0, 0),
        x("[0,18446744073709551615]", 0, 0),
        x("[-1,24]", 0, 96),
        x("[2.0,12]", 0, 96),
        x("[]", 0, 4),
        x("[25]", 0, 96),
        x("[24]", 0, 100),
        x("[24]", 96, 0),
        x("[24]", 1, 97),
        x("[24]", 0, most),
        x("[24]", most - 95, most),
        format!("{{{},{}}}", tensor("x", "F32", "[16]", 0, 64), tensor("labels", "I64", "[8]", 32, 96)),
        format!("{{{},{}}}", tensor("x", "F32", "[8]", 0, 32), tensor("labels", "I64", "[4]", 64, 96)),
        format!("{{{},{}}}", tensor("x", "F32", "[24]", 0, 96), tensor("x", "I8", "[96]", 0, 96)),
        format!("{{{}}}", tensor("x", "F31", "[24]", 0, 96)),
        format!("{{{}}}", tensor("x", "C64", "[12]", 0, 96)),
        format!("{{{}}}", tensor("x\\u0000\\n", "F32", "[24]", 0, 96)),
        format!("{{{}}}", tensor("x", "F32", &format!("[{}24]", "1,".repeat(100_000)), 0, 92)),
        format!("{}1{}", "{\"x\":".repeat(100_000), "}".repeat(100_000)),
        "[".repeat(1_000_000),
        format!("{{\"{}\":1}}", "x".repeat(4 << 20)),
        "{}".to_owned(),
        "null".to_owned(),
        String::new(),
        "{".to_owned(),
    ];
    headers.push(
        (0..20_000).fold("{".to_owned(), |all, index| all + &tensor(&format!("t{index}"), "U8", "[0]", 0, 0) + ",")
            + &tensor("labels", "F32", "[24]", 0, 96)
            + "}",
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let mut count = Count::default();
    for header in headers {
        let shown = &header[..header.len().min(200)];
        count.refuses(&path, with_header(&header, 96), "labels", shown);
    }
    // The length of the header alone.
    for length in [1, 7, 8, 1 << 20, 100_000_000, 1 << 32, 1 << 63, u64::MAX - 7, u64::MAX] {
        let mut bytes = with_header(&x("[24]", 0, 96), 96);
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        count.refuses(&path, bytes, "labels", &format!("header of {length} bytes"));
    }
    check_memory();
}

#[test]
fn npy_headers_that_promise_something_else_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npy");
    let mut count = Count::default();
    for (descr, shape) in [
        ("<f4", "(4294967296, 4294967296)"),
        ("<f4", "(18446744073709551615,)"),
        ("<f4", "(18446744073709551616,)"),
        ("<f4", "(4611686018427387904, 4)"),
        ("<f4", "(0, 18446744073709551615)"),
        ("<f4", "(-1, 24)"),
        ("<f4", "(25,)"),
        ("<f4", "(23,)"),
        ("<f4", "()"),
        ("<f4", "(,)"),
        ("<f4", "((24,),)"),
        (">f4", "(24,)"),
        ("<f16", "(6,)"),
        ("<c8", "(12,)"),
        ("|O", "(12,)"),
        ("<U12", "(2,)"),
        ("|S96", "(1,)"),
        ("<M8[ns]", "(12,)"),
        ("", "(24,)"),
        ("\u{e9}", "(24,)"),
        ("<f4', 'x': '", "(24,)"),
    ] {
        count.refuses(&path, npy(descr, shape, &floats(24)), "x", &format!("{descr} {shape}"));
    }
    let mut long = b"\x93NUMPY\x02\x00".to_vec();
    long.extend(u32::MAX.to_le_bytes());
    long.extend([b'{'; 4096]);
    count.refuses(&path, long, "x", "a header of 4 GiB");
}

#[test]
fn archives_that_unpack_to_more_than_they_say_or_to_very_much_take_little_memory() {
    const ZEROS: usize = 256 << 20;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npz");
    let mut count = Count::default();
    let before = peak_memory();
    {
        let x = npy("|u1", "(1048576, 256)", &vec![0; ZEROS]);
        fs_err::write(
            &path,
            zip(&[("x.npy", &x), ("labels.npy", &npy("|u1", "(2,)", &[0, 1]))], CompressionMethod::Deflated),
        )
        .unwrap();
    }
    let made = peak_memory();
    let mut bytes = fs_err::read(&path).unwrap();
    assert!(bytes.len() < ZEROS / 500, "{} bytes", bytes.len());
    // The size unpacked, in the directory at the end: less than there is, and more.
    let directory = bytes.windows(4).rposition(|window| window == b"PK\x01\x02").unwrap();
    let entry = bytes.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    assert!(entry < directory);
    for size in [0, 64, 1 << 20, (1 << 30) + 1, u32::MAX - 1] {
        bytes[entry + 24..entry + 28].copy_from_slice(&u32::to_le_bytes(size));
        let line = count.refuses(&path, &bytes, "x", &format!("{size} bytes promised"));
        assert_eq!(line.contains("as a zip bomb has"), size > 1 << 30, "{line}");
    }
    let after = peak_memory();
    assert!(after - made.max(before) < 64 << 20, "{} bytes", after - made);
}

fn image_bytes(format: ImageFormat) -> Vec<u8> {
    let image = RgbImage::from_fn(12, 10, |x, y| Rgb([(x * 20) as u8, (y * 25) as u8, ((x * y) % 256) as u8]));
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A folder of two images, one of them to be damaged, and labels.
fn image_folder(name: &str, format: ImageFormat) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs_err::write(&path, image_bytes(format)).unwrap();
    fs_err::write(folder.path().join("b.png"), image_bytes(ImageFormat::Png)).unwrap();
    fs_err::write(folder.path().join("labels.csv"), format!("file,label\n{name},3\nb.png,1\n")).unwrap();
    (folder, path)
}

#[test]
fn damaged_images_and_labels_are_survived() {
    let formats = [("a.png", ImageFormat::Png), ("a.jpg", ImageFormat::Jpeg), ("a.webp", ImageFormat::WebP)];
    for (name, format) in formats {
        let (folder, path) = image_folder(name, format);
        let mut count = Count::default();
        count.survives_damage(&path, folder.path(), &["images"], "labels", 3000);
        println!("{name}: {count:?}");
        assert!(count.refused > count.tried / 4, "{name}: {count:?}");
    }
    let (folder, _) = image_folder("a.png", ImageFormat::Png);
    let mut count = Count::default();
    let labels = folder.path().join("labels.csv");
    count.survives_damage(&labels, folder.path(), &["images"], "labels", 4000);
    println!("labels.csv: {count:?}");
    assert!(count.refused > count.tried / 4, "{count:?}");
    check_memory();
}

#[test]
fn images_that_promise_very_many_pixels_are_refused() {
    // A png's width and height stand behind its signature and the name of its first part, with a checksum over them.
    let mut png = image_bytes(ImageFormat::Png);
    png[16..20].copy_from_slice(&60_000_u32.to_be_bytes());
    png[20..24].copy_from_slice(&60_000_u32.to_be_bytes());
    let checksum = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&checksum.to_be_bytes());
    // A jpeg's stand in its frame header.
    let mut jpeg = image_bytes(ImageFormat::Jpeg);
    let frame = jpeg.windows(2).position(|window| window == [0xff, 0xc0]).unwrap();
    jpeg[frame + 5..frame + 9].fill(0xff);
    for (name, format, bytes) in [("a.png", ImageFormat::Png, png), ("a.jpg", ImageFormat::Jpeg, jpeg)] {
        let (folder, path) = image_folder(name, format);
        fs_err::write(path, bytes).unwrap();
        let line = Count::default().survives(folder.path(), &["images"], "labels", name);
        assert!(line.is_some_and(|line| line.contains(name)), "{name}");
    }
    check_memory();
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1)))
    })
}
