//! A folder of images as a data set: png, jpeg and webp files, found in sub-folders too, in sorted order, decoded batch
//! by batch. The tensor `images` is uint8 of shape (N, H, W, 3) in the order red, green, blue: grey images are repeated,
//! alpha is dropped, and an EXIF orientation is applied. Hidden files and folders are left out.

use std::fs;
use std::io::Cursor;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};
use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::error::{Error, Place};
use super::rows::Rows;
use super::transform::{self, Size};
use crate::config::Transform;

/// Files with other extensions are no images, but these are images that would be missed.
const UNREADABLE: [&str; 9] = ["avif", "bmp", "gif", "heic", "jp2", "pgm", "ppm", "tif", "tiff"];
const READABLE: [&str; 4] = ["jpeg", "jpg", "png", "webp"];
/// Bytes of a decoded image, and of a file, beyond which it is a mistake or an attack: 178 million pixels.
const MAX_BYTES: u64 = 1 << 29;

/// The images of a folder, as paths.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    root: PathBuf,
    /// Paths of the images below the root, sorted.
    files: Arc<[PathBuf]>,
    /// Names of the root's sub-folders, sorted.
    sub_folders: Vec<String>,
}

impl Folder {
    /// Finds the images below `root`; at least one.
    pub(super) fn open(root: &Path) -> Result<Self, Error> {
        let mut walk = Walk { files: Vec::new(), ancestors: Vec::new() };
        walk.visit(root, Path::new(""))?;
        if walk.files.is_empty() {
            return Err(Error::Format {
                path: root.to_owned(),
                expected: "a folder with png, jpeg or webp images".to_owned(),
                found: "none".to_owned(),
            });
        }
        let mut sub_folders = Vec::new();
        for (name, path) in entries(root)? {
            if path.is_dir() {
                sub_folders.push(name);
            }
        }
        Ok(Self { root: root.to_owned(), files: walk.files.into(), sub_folders })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn sub_folders(&self) -> &[String] {
        &self.sub_folders
    }

    /// Paths below the root, one per row.
    pub(super) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The images at `positions` of the chosen `rows` as uint8 (N, 3, H, W), resized and cropped.
    ///
    /// # Errors
    /// A file that is no image or damaged, images that do not come to one size.
    pub(super) fn read(&self, rows: &Rows, positions: Range<usize>, transform: &Transform) -> Result<Tensor, Error> {
        let paths: Vec<PathBuf> =
            rows.at(positions).filter_map(|row| self.files.get(row)).map(|file| self.root.join(file)).collect();
        let mut images = Vec::with_capacity(paths.len());
        let mut first: Option<(&Path, Size)> = None;
        // As many at a time as there are threads: decoded photographs are large until they are resized.
        for chunk in paths.chunks(rayon::current_num_threads().max(1)) {
            let decoded: Vec<Result<RgbImage, Error>> = chunk.par_iter().map(|path| decode(path)).collect();
            for (path, image) in chunk.iter().zip(decoded) {
                let (image, size) = tensor(path, &image?, transform)?;
                let &mut (other, expected) = first.get_or_insert((path, size));
                if size != expected {
                    let (expected, found) = (expected.to_string(), size.to_string());
                    return Err(Error::ImageSizes { path: path.clone(), expected, other: other.to_owned(), found });
                }
                images.push(image);
            }
        }
        Tensor::f_cat(&images, 0).map_err(Error::libtorch(&place(&self.root)))
    }
}

/// The tensor `images` of a folder, or of the file that is one row of it.
pub(super) fn place(path: &Path) -> Place {
    Place { path: path.to_owned(), tensor: "images".to_owned() }
}

struct Walk {
    files: Vec<PathBuf>,
    /// The folders being visited, without links: one that comes again is a loop.
    ancestors: Vec<PathBuf>,
}

impl Walk {
    fn visit(&mut self, folder: &Path, below_root: &Path) -> Result<(), Error> {
        let real = fs::canonicalize(folder).map_err(Error::io(folder))?;
        if self.ancestors.contains(&real) {
            return Err(Error::damaged(folder, "expected a folder, found a link to one that holds it"));
        }
        self.ancestors.push(real);
        for (name, path) in entries(folder)? {
            let below_root = below_root.join(&name);
            let metadata = fs::metadata(&path).map_err(Error::io(&path))?;
            let extension =
                path.extension().map(|text| text.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
            if metadata.is_dir() {
                self.visit(&path, &below_root)?;
            } else if READABLE.contains(&extension.as_str()) {
                if !metadata.is_file() {
                    // Reading a pipe would wait for its writer.
                    return Err(Error::damaged(&path, "expected an image, found a pipe or device"));
                }
                self.files.push(below_root);
            } else if UNREADABLE.contains(&extension.as_str()) {
                let expected = "png, jpeg or webp images".to_owned();
                return Err(Error::Format { path, expected, found: format!("an image of type .{extension}") });
            }
        }
        self.ancestors.pop();
        Ok(())
    }
}

/// Names and paths of what a folder holds, sorted by name, without hidden ones.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            return Err(Error::damaged(&path, "expected a name in UTF-8, found other bytes"));
        };
        if !name.starts_with('.') {
            entries.push((name.to_owned(), path));
        }
    }
    entries.sort();
    Ok(entries)
}

fn decode(path: &Path) -> Result<RgbImage, Error> {
    let too_large = |what: &str, found: u64| {
        Error::damaged(path, format_args!("expected an image of at most {MAX_BYTES} bytes{what}, found {found}"))
    };
    let file_size = fs::metadata(path).map_err(Error::io(path))?.len();
    if file_size > MAX_BYTES {
        return Err(too_large("", file_size));
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    // By content: a jpeg that is called .png is common, and no reason to stop.
    let reader = ImageReader::new(Cursor::new(&bytes)).with_guessed_format().map_err(Error::io(path))?;
    if reader.format() == Some(ImageFormat::Jpeg) && !is_whole_jpeg(&bytes) {
        return Err(Error::damaged(
            path,
            "expected a whole jpeg image, found one that is truncated: it has no end marker",
        ));
    }
    let failed = |error: image::ImageError| {
        Error::damaged(path, format_args!("expected a png, jpeg or webp image, found one that cannot be read: {error}"))
    };
    let mut decoder = reader.into_decoder().map_err(failed)?;
    if decoder.total_bytes() > MAX_BYTES {
        return Err(too_large(" when decoded", decoder.total_bytes()));
    }
    let orientation = decoder.orientation().map_err(failed)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(failed)?;
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

/// Whether a jpeg ends as the standard (ITU-T T.81, annex B) says. The decoder fills what is missing with grey.
fn is_whole_jpeg(bytes: &[u8]) -> bool {
    const START_BYTES: usize = 2;
    const END: u8 = 0xd9;
    let mut at = START_BYTES;
    while let Some(rest) = bytes.get(at..) {
        // In the coded data 0xff is followed by 0 or a restart marker; two bytes of 0xff are padding.
        let is_marker = |pair: &[u8]| pair[0] == 0xff && !matches!(pair[1], 0x00 | 0x01 | 0xd0..=0xd7 | 0xff);
        let Some(marker) = rest.windows(2).position(is_marker) else { return false };
        match rest.get(marker + 1..) {
            Some([END, ..]) => return true,
            Some([_, high, low, ..]) => at += marker + 2 + usize::from(u16::from_be_bytes([*high, *low])),
            _ => return false,
        }
    }
    false
}

/// One decoded image as uint8 (1, 3, H, W), resized and cropped, with its size then.
fn tensor(path: &Path, image: &RgbImage, transform: &Transform) -> Result<(Tensor, Size), Error> {
    let place = place(path);
    let size = Size { height: image.height() as usize, width: image.width() as usize };
    let geometry = transform::geometry(&place, size, transform)?;
    let shape = [1, i64::from(image.height()), i64::from(image.width()), 3];
    // tch copies as many bytes as the shape has, whatever the slice holds.
    let bytes = image.as_raw().get(..size.height * size.width * 3).unwrap_or_default();
    if bytes.is_empty() {
        return Err(Error::damaged(path, "expected an image of at least one pixel, found none"));
    }
    let stored = Tensor::f_from_data_size(bytes, &shape, Kind::Uint8).map_err(Error::libtorch(&place))?;
    let images =
        transform::resample(transform::to_nchw(&place, &stored)?, &geometry).map_err(Error::libtorch(&place))?;
    Ok((images, geometry.output(size)))
}
