//! Files as other programs write them, read back value by value; and damaged ones, which are errors and never a panic.

use std::fs;
use std::io::{Cursor, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use image::{ExtendedColorType, ImageEncoder, ImageFormat, Rgb, RgbImage};
use npyz::WriterBuilder;
use safetensors::tensor::TensorView;
use tch::{Kind, Tensor};
use tempfile::TempDir;

use super::{Batch, Dataset, Error, Input};
use crate::config::{Constant, DataPlan, InputSource, InputsPlan, Layout, Transform};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;
type Stored = safetensors::Dtype;

fn plan(path: &Path, tensors: &[&str]) -> DataPlan {
    DataPlan {
        path: path.to_owned(),
        inputs: InputsPlan::Positional(tensors.iter().map(|&name| InputSource::Tensor(name.to_owned())).collect()),
        samples: None,
        shuffle: false,
        seed: 0,
        batch_size: NonZeroUsize::new(2).unwrap(),
        transform: Transform::default(),
    }
}

fn values(input: &Input) -> Result<(Kind, Vec<i64>, Vec<f64>)> {
    let Input::Tensor(tensor) = input else { return Err("expected a tensor".into()) };
    assert!(tensor.is_contiguous());
    let flat = tensor.f_to_kind(Kind::Double)?.f_reshape([-1])?;
    Ok((tensor.kind(), tensor.size(), Vec::try_from(&flat)?))
}

/// Kind, shape and values of the only input in a batch of all rows.
fn all_rows(plan: &DataPlan) -> Result<(Kind, Vec<i64>, Vec<f64>)> {
    let batch = Dataset::open(plan)?.first(usize::MAX)?;
    values(&batch.inputs[0].1)
}

fn message(result: std::result::Result<impl Sized, Error>) -> String {
    match result {
        Ok(_) => "no error".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// What opening and reading everything says, without the folder's name.
fn complaint(plan: &DataPlan, folder: &TempDir) -> String {
    let read = || Dataset::open(plan)?.batches().collect::<std::result::Result<Vec<Batch>, Error>>();
    let text = message(read());
    assert!(!text.contains('\n'), "more than one line: {text}");
    text.replace(&format!("{}/", folder.path().display()), "")
}

fn bytes_of<T: little_endian::Bytes>(values: &[T]) -> Vec<u8> {
    values.iter().flat_map(|value| value.le()).collect()
}

/// Little-endian bytes of numbers.
mod little_endian {
    pub(super) trait Bytes {
        fn le(&self) -> Vec<u8>;
    }
    macro_rules! bytes {
        ($($number:ty),*) => {$(impl Bytes for $number {
            fn le(&self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
        })*};
    }
    bytes!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, half::f16, half::bf16);
}

fn safetensors(path: &Path, tensors: &[(&str, Stored, &[usize], Vec<u8>)]) -> Result<PathBuf> {
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, dtype, shape, data)| Ok((*name, TensorView::new(*dtype, shape.to_vec(), data)?)))
        .collect::<Result<_>>()?;
    fs::write(path, safetensors::serialize(views, None)?)?;
    Ok(path.to_owned())
}

fn npy<T: npyz::AutoSerialize + Clone>(shape: &[u64], data: &[T], order: npyz::Order) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let options = npyz::WriteOptions::new().default_dtype().shape(shape).order(order);
    let mut writer = options.writer(&mut bytes).begin_nd()?;
    writer.extend(data.iter().cloned())?;
    writer.finish()?;
    Ok(bytes)
}

fn npz(entries: &[(&str, Vec<u8>)], method: zip::CompressionMethod) -> Result<Vec<u8>> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        archive.start_file(*name, zip::write::SimpleFileOptions::default().compression_method(method))?;
        archive.write_all(bytes)?;
    }
    Ok(archive.finish()?.into_inner())
}

fn ramp(count: usize) -> Vec<f32> {
    (0..count).map(|index| index as f32).collect()
}

#[test]
fn safetensors_of_every_type() -> Result {
    let folder = TempDir::new()?;
    let halves = [half::f16::from_f32(1.5), half::f16::from_f32(-2.0)];
    let brains = [half::bf16::from_f32(1.5), half::bf16::from_f32(-2.0)];
    let cases: Vec<(Stored, Vec<u8>, Kind, [f64; 2])> = vec![
        (Stored::U8, vec![0, 255], Kind::Float, [0.0, 255.0]),
        (Stored::I8, bytes_of(&[-128i8, 127]), Kind::Int8, [-128.0, 127.0]),
        (Stored::I16, bytes_of(&[-300i16, 5]), Kind::Int16, [-300.0, 5.0]),
        (Stored::I32, bytes_of(&[-70_000i32, 5]), Kind::Int, [-70_000.0, 5.0]),
        (Stored::I64, bytes_of(&[1i64 << 40, -5]), Kind::Int64, [(1u64 << 40) as f64, -5.0]),
        (Stored::BOOL, vec![1, 0], Kind::Bool, [1.0, 0.0]),
        (Stored::F16, bytes_of(&halves), Kind::Float, [1.5, -2.0]),
        (Stored::BF16, bytes_of(&brains), Kind::Float, [1.5, -2.0]),
        (Stored::F32, bytes_of(&[1.5f32, -2.0]), Kind::Float, [1.5, -2.0]),
        (Stored::F64, bytes_of(&[1.5f64, -2.0]), Kind::Float, [1.5, -2.0]),
    ];
    for (dtype, data, kind, expected) in cases {
        // A tensor of another width in front, so that the one asked for begins at an odd offset.
        let tensors = [("a", Stored::U8, &[3][..], vec![9; 3]), ("x", dtype, &[2, 1][..], data)];
        let path = safetensors(&folder.path().join("x.safetensors"), &tensors)?;
        assert_eq!(all_rows(&plan(&path, &["x"]))?, (kind, vec![2, 1], expected.to_vec()), "{dtype:?}");
    }
    let path = safetensors(&folder.path().join("x.safetensors"), &[("x", Stored::U16, &[2], vec![0; 4])])?;
    let expected = "x.safetensors: tensor `x`: expected uint8, int8, int16, int32, int64, bool, float16, bfloat16, \
                    float32 or float64 elements, found uint16 elements";
    assert_eq!(complaint(&plan(&path, &["x"]), &folder), expected);
    Ok(())
}

#[test]
fn batches_cover_the_rows_in_order() -> Result {
    let folder = TempDir::new()?;
    let tensors =
        [("x", Stored::F32, &[5, 2][..], bytes_of(&ramp(10))), ("n", Stored::I64, &[5], bytes_of(&[7i64; 5]))];
    let path = safetensors(&folder.path().join("x.safetensors"), &tensors)?;
    let mut plan = plan(&path, &[]);
    plan.inputs = InputsPlan::Named(vec![
        ("b".to_owned(), InputSource::Tensor("x".to_owned())),
        ("a".to_owned(), InputSource::Const(Constant::Int(16_000))),
        ("n".to_owned(), InputSource::Tensor("n".to_owned())),
    ]);
    let data = Dataset::open(&plan)?;
    assert_eq!((data.rows(), data.batches().len()), (5, 3));
    let batches: Vec<Batch> = data.batches().collect::<std::result::Result<_, _>>()?;
    let places: Vec<(usize, usize)> = batches.iter().map(|batch| (batch.first_row, batch.rows)).collect();
    assert_eq!(places, [(0, 2), (2, 2), (4, 1)]);
    let names: Vec<Option<&str>> = batches[0].inputs.iter().map(|(name, _)| name.as_deref()).collect();
    assert_eq!(names, [Some("b"), Some("a"), Some("n")]);
    assert!(matches!(batches[0].inputs[1].1, Input::Const(Constant::Int(16_000))));
    assert_eq!(values(&batches[1].inputs[0].1)?.2, [4.0, 5.0, 6.0, 7.0]);
    assert_eq!(values(&batches[2].inputs[0].1)?.1, [1, 2]);
    assert_eq!(data.first(0)?.rows, 1);
    assert_eq!(data.first(3)?.rows, 3);
    Ok(())
}

#[test]
fn shuffled_rows_belong_together_and_repeat() -> Result {
    let folder = TempDir::new()?;
    let labels: Vec<u16> = (0..100).collect();
    let tensors =
        [("x", Stored::F32, &[100, 2][..], bytes_of(&ramp(200))), ("y", Stored::U16, &[100], bytes_of(&labels))];
    let path = safetensors(&folder.path().join("x.safetensors"), &tensors)?;
    let mut plan = plan(&path, &["x"]);
    (plan.shuffle, plan.samples) = (true, NonZeroUsize::new(20));
    let data = Dataset::open(&plan)?;
    let rows = values(&data.first(20)?.inputs[0].1)?.2;
    let labels: Vec<i64> = Vec::try_from(&data.labels("y")?)?;
    assert_eq!(labels.len(), 20);
    assert!(labels.is_sorted() && labels[19] > 19, "{labels:?}");
    let of_labels: Vec<f64> = labels.iter().flat_map(|&label| [2.0 * label as f64, 2.0 * label as f64 + 1.0]).collect();
    assert_eq!(rows, of_labels);
    assert_eq!(all_rows(&plan)?.2, rows);
    plan.seed = 1;
    assert_ne!(all_rows(&plan)?.2, rows);
    Ok(())
}

#[test]
fn npy_and_npz_hold_the_same_values() -> Result {
    let folder = TempDir::new()?;
    let bytes = npy(&[3, 2], &ramp(6), npyz::Order::C)?;
    let lone = folder.path().join("features.npy");
    fs::write(&lone, &bytes)?;
    assert_eq!(
        all_rows(&plan(&lone, &["features"]))?,
        (Kind::Float, vec![3, 2], ramp(6).into_iter().map(f64::from).collect())
    );
    let ids = npy(&[3], &[5i64, -6, 1 << 50], npyz::Order::C)?;
    for method in [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated] {
        let path = folder.path().join("x.npz");
        fs::write(
            &path,
            npz(&[("features.npy", bytes.clone()), ("ids.npy", ids.clone()), ("notes.txt", vec![1])], method)?,
        )?;
        let data = Dataset::open(&plan(&path, &["features", "ids"]))?;
        let batches: Vec<Batch> = data.batches().collect::<std::result::Result<_, _>>()?;
        assert_eq!(values(&batches[1].inputs[0].1)?.2, [4.0, 5.0]);
        assert_eq!(values(&batches[1].inputs[1].1)?, (Kind::Int64, vec![1], vec![(1u64 << 50) as f64]));
        assert_eq!(Vec::<i64>::try_from(&data.labels("ids")?)?, [5, -6, 1 << 50]);
        let expected = "x.npz: tensor `feature` is missing, did you mean `features`?; there are `features`, `ids`";
        assert_eq!(complaint(&plan(&path, &["feature"]), &folder), expected);
    }
    Ok(())
}

#[test]
fn numpy_layouts_that_are_refused() -> Result {
    let folder = TempDir::new()?;
    let path = folder.path().join("x.npy");
    fs::write(&path, npy(&[3, 2], &ramp(6), npyz::Order::Fortran)?)?;
    let expected = "x.npy: tensor `x`: expected C order (save `numpy.ascontiguousarray(a)` again), found Fortran order";
    assert_eq!(complaint(&plan(&path, &["x"]), &folder), expected);
    let swapped = npy(&[3, 2], &ramp(6), npyz::Order::C)?
        .iter()
        .map(|&byte| if byte == b'<' { b'>' } else { byte })
        .collect::<Vec<u8>>();
    fs::write(&path, swapped)?;
    assert!(complaint(&plan(&path, &["x"]), &folder).ends_with("found big-endian float32"));
    fs::write(&path, npy(&[], &[1f32], npyz::Order::C)?)?;
    assert!(complaint(&plan(&path, &["x"]), &folder).ends_with("found a single number"));
    fs::write(&path, npy::<f32>(&[0, 2], &[], npyz::Order::C)?)?;
    assert!(complaint(&plan(&path, &["x"]), &folder).ends_with("expected at least one element, found shape [0, 2]"));
    Ok(())
}

#[test]
fn a_header_that_lies_costs_no_memory() -> Result {
    let folder = TempDir::new()?;
    let path = folder.path().join("x.npy");
    for shape in ["(3000000000000, 9)", "(4294967296, 4294967296, 8)"] {
        let text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n");
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.extend([0; 64]);
        fs::write(&path, bytes)?;
        let text = complaint(&plan(&path, &["x"]), &folder);
        assert!(text.ends_with("found 64 bytes"), "{text}");
    }
    fs::write(folder.path().join("x.safetensors"), [&(1u64 << 60).to_le_bytes()[..], b"{"].concat())?;
    let text = complaint(&plan(&folder.path().join("x.safetensors"), &["x"]), &folder);
    assert!(text.starts_with("x.safetensors: expected a header of at most 1 bytes"), "{text}");
    Ok(())
}

#[test]
fn values_that_are_not_finite_name_their_row() -> Result {
    let folder = TempDir::new()?;
    let path = folder.path().join("x.safetensors");
    for (value, text) in [(f64::NAN, "NaN"), (f64::NEG_INFINITY, "-inf"), (1e300, "1e300")] {
        let mut data = [0.5f64; 6];
        data[5] = value;
        let text = if text == "1e300" { format!("{value}") } else { text.to_owned() };
        safetensors(&path, &[("x", Stored::F64, &[3, 2], bytes_of(&data))])?;
        let expected = format!("x.safetensors: tensor `x`: expected finite float32 values, found {text} in row 2");
        assert_eq!(complaint(&plan(&path, &["x"]), &folder), expected);
    }
    // A sum beyond float32 of values within is no error.
    safetensors(&path, &[("x", Stored::F32, &[3], bytes_of(&[f32::MAX; 3]))])?;
    assert_eq!(all_rows(&plan(&path, &["x"]))?.2, [f64::from(f32::MAX); 3]);
    safetensors(&path, &[("x", Stored::BOOL, &[3], vec![0, 1, 2])])?;
    assert!(complaint(&plan(&path, &["x"]), &folder).ends_with("expected bools of 0 or 1, found 2 in row 2"));
    Ok(())
}

#[test]
fn plans_that_do_not_fit_the_data() -> Result {
    let folder = TempDir::new()?;
    let tensors = [
        ("images", Stored::U8, &[3, 2, 4, 4][..], vec![0; 96]),
        ("ids", Stored::I64, &[3, 2], bytes_of(&[1i64; 6])),
        ("more", Stored::F32, &[4, 2], bytes_of(&ramp(8))),
    ];
    let path = safetensors(&folder.path().join("x.safetensors"), &tensors)?;
    let say = |tensors: &[&str], edit: &dyn Fn(&mut DataPlan)| {
        let mut plan = plan(&path, tensors);
        edit(&mut plan);
        complaint(&plan, &folder)
    };
    let rows = say(&["ids", "more"], &|_| ());
    assert_eq!(rows, "x.safetensors: tensor `more`: expected 3 rows, as tensor `ids` has, found 4");
    let samples = say(&["ids"], &|plan| plan.samples = NonZeroUsize::new(4));
    assert_eq!(samples, "x.safetensors: expected at least 4 rows, as `samples` says, found 3");
    let constants = say(&[], &|plan| plan.inputs = InputsPlan::Positional(vec![InputSource::Const(Constant::None)]));
    assert!(constants.contains("found constants only"), "{constants}");
    let mean = say(&["images"], &|plan| plan.transform.mean = Some(vec![1.0; 3]));
    assert_eq!(mean, "x.safetensors: tensor `images`: `mean` expects 1 or 2 values, one per channel, found 3");
    let resize = say(&["more"], &|plan| plan.transform.resize = Some(3));
    assert_eq!(resize, "x.safetensors: tensor `more`: `resize` expects images, tensors of rank 4, found shape [4, 2]");
    let crop = say(&["images"], &|plan| plan.transform.crop = Some([5, 4]));
    assert_eq!(crop, "x.safetensors: tensor `images`: `crop` expects images of at least 5x4, found 4x4");
    // Ids are no images, and no transform touches them.
    assert_eq!(say(&["ids"], &|plan| plan.transform.resize = Some(3)), "no error");
    let labels = |name: &str| message(Dataset::open(&plan(&path, &["ids"])).and_then(|data| data.labels(name)));
    assert!(labels("more").ends_with("expected 3 rows, as tensor `ids` has, found 4"));
    assert!(
        labels("images").ends_with("class indices of shape [N], [N, K], [N, T] or [N, T, K], found shape [3, 2, 4, 4]")
    );
    assert_eq!(labels("ids"), "no error");
    Ok(())
}

#[test]
fn names_that_lie() -> Result {
    let folder = TempDir::new()?;
    for (name, bytes, expected) in [
        ("x.npz", &b"\x93NUMPY\x01\x00"[..], "x.npz: expected a zip archive, as .npz is, found .npy data"),
        ("x.safetensors", b"", "x.safetensors: expected safetensors data, found an empty file"),
        ("x.npy", b"PK\x03\x04", "x.npy: expected .npy data, found a zip archive, as .npz is"),
        (
            "x.pt",
            b"PK\x03\x04",
            "x.pt: expected a .safetensors, .npz or .npy file, or a folder of images, found a zip archive, as .npz is",
        ),
    ] {
        fs::write(folder.path().join(name), bytes)?;
        assert_eq!(complaint(&plan(&folder.path().join(name), &["x"]), &folder), expected);
    }
    assert!(complaint(&plan(&folder.path().join("none.npy"), &["x"]), &folder).starts_with("none.npy: No such file"));
    Ok(())
}

#[test]
fn scale_mean_and_std_per_channel() -> Result {
    let folder = TempDir::new()?;
    // (1, 1, 2, 2) as (N, H, W, C): pixel 0 is (10, 20), pixel 1 is (30, 40).
    let path =
        safetensors(&folder.path().join("x.safetensors"), &[("x", Stored::U8, &[1, 1, 2, 2], vec![10, 20, 30, 40])])?;
    let mut plan = plan(&path, &["x"]);
    plan.transform = Transform {
        layout: Layout::Nhwc,
        scale: Some(0.5),
        mean: Some(vec![1.0, 2.0]),
        std: Some(vec![4.0]),
        ..Transform::default()
    };
    assert_eq!(all_rows(&plan)?, (Kind::Float, vec![1, 2, 1, 2], vec![1.0, 3.5, 2.0, 4.5]));
    let path = safetensors(&path, &[("x", Stored::F32, &[2, 2], bytes_of(&[10f32, 20.0, 30.0, 40.0]))])?;
    plan.path = path;
    assert_eq!(all_rows(&plan)?.2, [1.0, 2.0, 3.5, 4.5]);
    Ok(())
}

/// Made with torchvision 0.26, torch 2.11:
///
/// ```python
/// import torch
/// from torchvision.transforms import functional as F
/// x = ((torch.arange(2 * 7 * 10) * 73) % 251).to(torch.uint8).reshape(1, 2, 7, 10)
/// print(F.resize(x, 4, antialias=True).flatten().tolist())                       # (1, 2, 4, 5)
/// print(F.resize(x.float(), 4, antialias=True).flatten()[:5].tolist())
/// print(F.resize(x[:, :1, :3, :2], 5, antialias=True).flatten().tolist())        # (1, 1, 7, 5)
/// print(F.center_crop(x, [4, 3]).flatten().tolist())
/// ```
mod torchvision {
    pub(super) const RESIZED: [u8; 40] = [
        91, 141, 101, 131, 108, 112, 128, 136, 144, 91, 147, 115, 132, 131, 126, 141, 88, 167, 127, 120, 130, 135, 126,
        86, 181, 94, 126, 122, 121, 145, 129, 151, 109, 117, 110, 124, 132, 122, 152, 101,
    ];
    pub(super) const RESIZED_FLOAT: [f64; 5] = [91.3197, 140.5714, 101.3095, 130.7738, 107.8843];
    pub(super) const ENLARGED: [u8; 35] = [
        0, 7, 36, 66, 73, 33, 36, 51, 66, 70, 130, 123, 95, 67, 60, 228, 210, 139, 68, 50, 218, 200, 129, 58, 40, 208,
        190, 119, 48, 30, 205, 187, 116, 45, 27,
    ];
    pub(super) const CROPPED: [u8; 24] =
        [246, 68, 141, 223, 45, 118, 200, 22, 95, 177, 250, 72, 85, 158, 231, 62, 135, 208, 39, 112, 185, 16, 89, 162];
}

/// The image of the recipe above, without its batch axis: (2, 7, 10).
fn pixel(channel: usize, row: usize, column: usize) -> u8 {
    (((channel * 7 + row) * 10 + column) * 73 % 251) as u8
}

fn floats(values: &[u8]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

#[test]
fn resize_and_crop_are_those_of_torchvision() -> Result {
    let folder = TempDir::new()?;
    let file = folder.path().join("x.safetensors");
    let pixels: Vec<u8> = (0..140).map(|index| pixel(index / 70, index / 10 % 7, index % 10)).collect();
    let path = safetensors(&file, &[("x", Stored::U8, &[1, 2, 7, 10], pixels.clone())])?;
    let mut plan = plan(&path, &["x"]);
    plan.transform.resize = Some(4);
    assert_eq!(all_rows(&plan)?, (Kind::Float, vec![1, 2, 4, 5], floats(&torchvision::RESIZED)));
    (plan.transform.resize, plan.transform.crop) = (None, Some([4, 3]));
    assert_eq!(all_rows(&plan)?, (Kind::Float, vec![1, 2, 4, 3], floats(&torchvision::CROPPED)));

    (plan.transform.resize, plan.transform.crop) = (Some(4), None);
    safetensors(
        &file,
        &[("x", Stored::F32, &[1, 2, 7, 10], bytes_of(&pixels.iter().map(|&p| f32::from(p)).collect::<Vec<_>>()))],
    )?;
    for (found, expected) in all_rows(&plan)?.2.iter().zip(torchvision::RESIZED_FLOAT) {
        // The golden numbers have four decimals.
        assert!((found - expected).abs() < 1e-4, "{found} for {expected}");
    }
    let corner: Vec<u8> = (0..6).map(|index| pixel(0, index / 2, index % 2)).collect();
    safetensors(&file, &[("x", Stored::U8, &[1, 3, 2, 1], corner)])?;
    (plan.transform.resize, plan.transform.layout) = (Some(5), Layout::Nhwc);
    assert_eq!(all_rows(&plan)?, (Kind::Float, vec![1, 1, 7, 5], floats(&torchvision::ENLARGED)));
    Ok(())
}

fn rgb(height: u32, width: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([0, 1, 2].map(|channel| pixel(channel, y as usize, x as usize))))
}

fn save(path: &Path, image: &RgbImage, format: ImageFormat) -> Result {
    fs::create_dir_all(path.parent().ok_or("no parent")?)?;
    Ok(image.save_with_format(path, format)?)
}

#[test]
fn a_folder_of_images_with_classes() -> Result {
    let folder = TempDir::new()?;
    let root = folder.path();
    save(&root.join("cat/b.PNG"), &rgb(2, 3), ImageFormat::Png)?;
    save(&root.join("cat/deep/a.png"), &rgb(2, 3), ImageFormat::Png)?;
    save(&root.join("ant/z.webp"), &rgb(2, 3), ImageFormat::WebP)?;
    image::GrayImage::from_fn(3, 2, |x, y| image::Luma([(10 * y + x) as u8])).save(root.join("ant/grey.png"))?;
    image::RgbaImage::from_pixel(3, 2, image::Rgba([1, 2, 3, 0])).save(root.join("ant/alpha.png"))?;
    fs::write(root.join("ant/.hidden.png"), "no image")?;
    fs::write(root.join("ant/notes.txt"), "no image")?;
    let mut plan = plan(root, &["images"]);
    let data = Dataset::open(&plan)?;
    assert_eq!(Vec::<i64>::try_from(&data.labels("labels")?)?, [0, 0, 0, 1, 1]);
    let (kind, shape, values) = values(&data.first(5)?.inputs[0].1)?;
    assert_eq!((kind, shape), (Kind::Float, vec![5, 3, 2, 3]));
    let image: Vec<f64> = (0..18).map(|index| f64::from(pixel(index / 6, index / 3 % 2, index % 3))).collect();
    assert_eq!(values[..18], [1.0, 2.0, 3.0].map(|value| [value; 6]).concat(), "alpha.png");
    assert_eq!(values[18..36], [0.0, 1.0, 2.0, 10.0, 11.0, 12.0].repeat(3), "grey.png");
    for start in [36, 54, 72] {
        assert_eq!(values[start..start + 18], image, "lossless");
    }
    plan.transform.mean = Some(vec![1.0, 2.0]);
    assert!(message(Dataset::open(&plan)).ends_with("`mean` expects 1 or 3 values, one per channel, found 2"));
    plan.inputs = InputsPlan::Positional(vec![InputSource::Tensor("image".to_owned())]);
    assert!(message(Dataset::open(&plan)).ends_with("missing, did you mean `images`?; there are `images`, `labels`"));
    Ok(())
}

#[test]
fn class_folders_that_are_numbers() -> Result {
    let folder = TempDir::new()?;
    for class in ["10", "2"] {
        save(&folder.path().join(class).join("a.png"), &rgb(2, 3), ImageFormat::Png)?;
    }
    let data = Dataset::open(&plan(folder.path(), &["images"]))?;
    assert_eq!(Vec::<i64>::try_from(&data.labels("labels")?)?, [10, 2]);
    save(&folder.path().join("beside.png"), &rgb(2, 3), ImageFormat::Png)?;
    let data = Dataset::open(&plan(folder.path(), &["images"]))?;
    assert!(message(data.labels("labels")).contains("beside.png: expected each image in the sub-folder of its class"));
    Ok(())
}

#[test]
fn labels_from_csv() -> Result {
    let folder = TempDir::new()?;
    save(&folder.path().join("a.png"), &rgb(2, 3), ImageFormat::Png)?;
    save(&folder.path().join("sub/b.png"), &rgb(2, 3), ImageFormat::Png)?;
    let data = Dataset::open(&plan(folder.path(), &["images"]))?;
    let csv = folder.path().join("labels.csv");
    for text in ["sub/b.png,3\na.png,4\n", "file,label\n./a.png , 4\nsub/b.png,3\nother.png,7\n"] {
        fs::write(&csv, text)?;
        assert_eq!(Vec::<i64>::try_from(&data.labels("labels")?)?, [4, 3]);
    }
    for (text, expected) in [
        ("a.png,4\n", "labels.csv: expected a line for each image, found none for sub/b.png"),
        ("a.png,cat\n", "labels.csv: line 1: expected a class index of 0 or more, found `cat`"),
        ("a.png,1\na.png,2\n", "labels.csv: line 2: expected one label for a.png, found 1 and 2"),
        ("a.png\n", "labels.csv: line 1: expected two columns, file,label, found 1"),
    ] {
        fs::write(&csv, text)?;
        assert!(message(data.labels("labels")).ends_with(expected), "{}", message(data.labels("labels")));
    }
    Ok(())
}

#[test]
fn images_of_different_sizes_need_resize_and_crop() -> Result {
    let folder = TempDir::new()?;
    save(&folder.path().join("a.png"), &rgb(20, 30), ImageFormat::Png)?;
    save(&folder.path().join("b.png"), &rgb(30, 20), ImageFormat::Png)?;
    let mut plan = plan(folder.path(), &["images"]);
    let text = complaint(&plan, &folder);
    assert!(text.starts_with("b.png: expected 20x30, the height and width of a.png"), "{text}");
    assert!(text.contains("found 30x20; `resize` and `crop`"), "{text}");
    plan.transform.resize = Some(8);
    assert!(complaint(&plan, &folder).starts_with("b.png: expected 8x12,"));
    plan.transform.crop = Some([6, 7]);
    let (_, shape, _) = all_rows(&plan)?;
    assert_eq!(shape, [2, 3, 6, 7]);
    Ok(())
}

#[test]
fn exif_orientation_turns_the_image() -> Result {
    let folder = TempDir::new()?;
    let image = rgb(2, 3);
    // A TIFF header, one entry: tag 0x112 (orientation), type short, value 6 (turn clockwise to show).
    let mut exif = b"II*\0\x08\0\0\0\x01\0".to_vec();
    exif.extend(b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0");
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::png::PngEncoder::new(&mut bytes);
    encoder.set_exif_metadata(exif)?;
    encoder.write_image(image.as_raw(), 3, 2, ExtendedColorType::Rgb8)?;
    // A name that lies about the format is no reason to stop.
    fs::write(folder.path().join("turned.jpg"), bytes)?;
    let (_, shape, values) = all_rows(&plan(folder.path(), &["images"]))?;
    assert_eq!(shape, [1, 3, 3, 2]);
    let red: Vec<u8> = [(1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (0, 2)].iter().map(|&(y, x)| pixel(0, y, x)).collect();
    assert_eq!(values[..6], floats(&red));
    Ok(())
}

#[test]
fn folders_that_are_refused() -> Result {
    let folder = TempDir::new()?;
    let say = || complaint(&plan(folder.path(), &["images"]), &folder);
    assert!(say().ends_with("expected a folder with png, jpeg or webp images, found none"), "{}", say());
    fs::write(folder.path().join("a.png"), "no image")?;
    assert!(say().starts_with("a.png: expected a png, jpeg or webp image, found one that cannot be read"), "{}", say());
    fs::write(folder.path().join("b.bmp"), "BM")?;
    assert!(say().starts_with("b.bmp: expected png, jpeg or webp images, found an image of type .bmp"), "{}", say());
    fs::remove_file(folder.path().join("b.bmp"))?;
    std::os::unix::fs::symlink(folder.path(), folder.path().join("loop"))?;
    assert!(say().contains("found a link to one that holds it"), "{}", say());
    Ok(())
}

/// Opens and reads a damaged file; whether that works is the file's affair.
fn read_all(plan: &DataPlan, labels: &str) -> std::result::Result<(), Error> {
    let data = Dataset::open(plan)?;
    for batch in data.batches() {
        batch?;
    }
    data.labels(labels).map(|_| ())
}

/// Cuts `bytes` at every length and changes every byte to a few others; returns how many of the cut files were read.
fn mutate(path: &Path, bytes: &[u8], plan: &DataPlan, labels: &str) -> Result<usize> {
    let mut read = 0;
    for length in 0..bytes.len() {
        fs::write(path, &bytes[..length])?;
        read += usize::from(read_all(plan, labels).is_ok());
    }
    let mut changed = bytes.to_vec();
    for (index, &byte) in bytes.iter().enumerate() {
        for other in [byte ^ 1, byte ^ 0x80, 0, 0xff, b'9'] {
            changed[index] = other;
            fs::write(path, &changed)?;
            let error = message(read_all(plan, labels));
            assert!(!error.contains('\n'), "byte {index} = {other}: {error}");
        }
        changed[index] = byte;
    }
    fs::write(path, bytes)?;
    read_all(plan, labels)?;
    Ok(read)
}

#[test]
fn damaged_files_are_errors_and_never_panics() -> Result {
    let folder = TempDir::new()?;
    let path = folder.path().join("x.safetensors");
    let tensors = [("x", Stored::F32, &[3, 2][..], bytes_of(&ramp(6))), ("y", Stored::U8, &[3], vec![1, 2, 3])];
    safetensors(&path, &tensors)?;
    assert_eq!(mutate(&path, &fs::read(&path)?, &plan(&path, &["x"]), "y")?, 0);

    let path = folder.path().join("x.npy");
    let ids = npy(&[3], &[1i16, 2, 3], npyz::Order::C)?;
    assert_eq!(mutate(&path, &ids, &plan(&path, &["x"]), "x")?, 0);

    let path = folder.path().join("x.npz");
    let features = npy(&[3, 2], &ramp(6), npyz::Order::C)?;
    for method in [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated] {
        let bytes = npz(&[("x.npy", features.clone()), ("y.npy", ids.clone())], method)?;
        assert_eq!(mutate(&path, &bytes, &plan(&path, &["x"]), "y")?, 0);
    }
    Ok(())
}

#[test]
fn damaged_images_are_errors_and_never_panics() -> Result {
    // A png whose last chunk, which says that it ends, is cut short has all its pixels.
    let cases = [("a.png", ImageFormat::Png, 12), ("a.jpg", ImageFormat::Jpeg, 0), ("a.webp", ImageFormat::WebP, 0)];
    for (name, format, harmless) in cases {
        let folder = TempDir::new()?;
        let path = folder.path().join("0").join(name);
        save(&path, &rgb(3, 4), format)?;
        let read = mutate(&path, &fs::read(&path)?, &plan(folder.path(), &["images"]), "labels")?;
        assert!(read <= harmless, "{name}: {read} cut files were read");
    }
    Ok(())
}

#[test]
fn a_batch_reads_its_own_rows_only() -> Result {
    let folder = TempDir::new()?;
    let path = folder.path().join("x.safetensors");
    // A sparse file: 256 GiB of rows that take no disk. Reading it whole would take hours, mapping it address space.
    let (rows, width) = (1usize << 26, 1usize << 10);
    let header =
        format!("{{\"x\":{{\"dtype\":\"F32\",\"shape\":[{rows},{width}],\"data_offsets\":[0,{}]}}}}", rows * width * 4);
    let mut file = fs::File::create(&path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    file.set_len(8 + header.len() as u64 + (rows * width * 4) as u64)?;
    let mut plan = plan(&path, &["x"]);
    let data = Dataset::open(&plan)?;
    assert_eq!(data.rows(), rows);
    let mut batches = data.batches();
    assert_eq!(batches.next().ok_or("no batch")??.rows, 2);
    // Draws from all rows, far into the file, and reads what it draws.
    (plan.shuffle, plan.samples) = (true, NonZeroUsize::new(3));
    assert_eq!(all_rows(&plan)?, (Kind::Float, vec![3, 1024], vec![0.0; 3072]));
    Ok(())
}

#[test]
fn a_data_set_may_be_shared_between_threads() {
    fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<Dataset>();
}

#[test]
fn libtorch_messages_are_one_line() -> Result {
    let place = super::Place { path: PathBuf::from("x"), tensor: "y".to_owned() };
    let error = Tensor::f_from_slice(&[1f32, 2.0])?.f_view([3]).map_err(Error::libtorch(&place));
    assert!(!message(error).contains('\n'));
    Ok(())
}
