//! From stored values to the model's values: resize, crop, layout, float32, scale, mean, std. Knows no file.
//!
//! Only uint8 and float tensors are transformed; ids and masks pass untouched. Resize and crop are torchvision's (0.26,
//! `transforms.functional` on tensors, `antialias=True`).

use tch::{Kind, Tensor};

use super::dtype::Dtype;
use super::error::{Error, Place, shape_text};
use crate::config::{Layout, Transform};

/// More pixels than this in a resized image are a mistake: an image that is thousands of times longer than wide.
const MAX_PIXELS: usize = 1 << 28;

/// Height and width of an image in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) height: usize,
    pub(super) width: usize,
}

impl std::fmt::Display for Size {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}x{}", self.height, self.width)
    }
}

/// What resize and crop do to images of one size.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// New size, where it differs.
    resize: Option<Size>,
    crop: Option<Crop>,
}

#[derive(Debug, PartialEq, Eq)]
struct Crop {
    top: usize,
    left: usize,
    size: Size,
}

impl Geometry {
    /// What images of `size` come to.
    pub(super) fn output(&self, size: Size) -> Size {
        self.crop.as_ref().map(|crop| crop.size).or(self.resize).unwrap_or(size)
    }
}

/// Refuses a transform that does not fit a stored tensor of this type and shape, rows first.
pub(super) fn check(place: &Place, dtype: Dtype, shape: &[usize], transform: &Transform) -> Result<(), Error> {
    if !dtype.is_transformed() {
        return Ok(());
    }
    let is_nhwc = transform.layout == Layout::Nhwc;
    let channels = match *shape {
        [_, height, width, channels] if is_nhwc => {
            geometry(place, Size { height, width }, transform)?;
            channels
        }
        [_, channels, height, width] => {
            geometry(place, Size { height, width }, transform)?;
            channels
        }
        _ => {
            refuse_image_options(place, shape, transform)?;
            shape.get(1).copied().unwrap_or(1)
        }
    };
    check_channels(place, channels, transform)
}

/// Refuses lists of means and standard deviations of the wrong length.
pub(super) fn check_channels(place: &Place, channels: usize, transform: &Transform) -> Result<(), Error> {
    for (option, values) in [("mean", &transform.mean), ("std", &transform.std)] {
        if let Some(values) = values
            && values.len() != 1
            && values.len() != channels
        {
            let expected =
                if channels == 1 { "1 value".to_owned() } else { format!("1 or {channels} values, one per channel") };
            let found = values.len().to_string();
            return Err(Error::Transform { place: place.clone(), option, expected, found });
        }
    }
    Ok(())
}

fn refuse_image_options(place: &Place, shape: &[usize], transform: &Transform) -> Result<(), Error> {
    let option = match (transform.resize, transform.crop) {
        (Some(_), _) => "resize",
        (None, Some(_)) => "crop",
        (None, None) => return Ok(()),
    };
    let (expected, found) = ("images, tensors of rank 4".to_owned(), format!("shape {}", shape_text(shape)));
    Err(Error::Transform { place: place.clone(), option, expected, found })
}

/// What resize and crop do to images of `size`.
///
/// # Errors
/// A crop that is larger than the (resized) image, a resized image of more than 2^28 pixels.
pub(super) fn geometry(place: &Place, size: Size, transform: &Transform) -> Result<Geometry, Error> {
    let resized = match transform.resize {
        Some(short) => resized(size, short as usize),
        None => size,
    };
    if resized.height.saturating_mul(resized.width) > MAX_PIXELS && resized != size {
        let (expected, found) = (format!("to make at most {MAX_PIXELS} pixels"), format!("{resized} from {size}"));
        return Err(Error::Transform { place: place.clone(), option: "resize", expected, found });
    }
    let crop = match transform.crop {
        Some([height, width]) => {
            let crop = Size { height: height as usize, width: width as usize };
            Some(centre(resized, crop).ok_or_else(|| {
                let (expected, found) = (format!("images of at least {crop}"), resized.to_string());
                Error::Transform { place: place.clone(), option: "crop", expected, found }
            })?)
        }
        None => None,
    };
    Ok(Geometry { resize: (resized != size).then_some(resized), crop })
}

/// torchvision: the short side becomes `short`, the long side `int(short * long / short side)`.
fn resized(size: Size, short: usize) -> Size {
    let scaled = |long: usize, side: usize| (short.saturating_mul(long) as f64 / side as f64) as usize;
    if size.width <= size.height {
        Size { height: scaled(size.height, size.width), width: short }
    } else {
        Size { height: short, width: scaled(size.width, size.height) }
    }
}

/// torchvision: `int(round((height - crop_height) / 2.0))` with Python's rounding of halves to even numbers.
fn centre(image: Size, crop: Size) -> Option<Crop> {
    let start = |side: usize, part: usize| {
        side.checked_sub(part).map(|margin| (margin as f64 / 2.0).round_ties_even() as usize)
    };
    Some(Crop { top: start(image.height, crop.height)?, left: start(image.width, crop.width)?, size: crop })
}

/// A stored batch as the model wants it: (N, C, H, W) or any other shape, float32; ids and masks unchanged.
pub(super) fn apply(place: &Place, stored: Tensor, dtype: Dtype, transform: &Transform) -> Result<Tensor, Error> {
    if !dtype.is_transformed() {
        return Ok(stored);
    }
    let tensor = match transform.layout {
        Layout::Nhwc if stored.dim() == 4 => to_nchw(place, &stored)?,
        _ => stored,
    };
    let tensor = match *tensor.size() {
        [_, _, height, width] => {
            let size = Size { height: height as usize, width: width as usize };
            resample(tensor, &geometry(place, size, transform)?).map_err(Error::libtorch(place))?
        }
        _ => tensor,
    };
    normalize(place, tensor, transform)
}

/// (N, H, W, C) becomes (N, C, H, W), contiguous.
pub(super) fn to_nchw(place: &Place, images: &Tensor) -> Result<Tensor, Error> {
    images.f_permute([0, 3, 1, 2]).and_then(|images| images.f_contiguous()).map_err(Error::libtorch(place))
}

/// Resizes and crops (N, C, H, W); the element type stays.
pub(super) fn resample(mut images: Tensor, geometry: &Geometry) -> Result<Tensor, tch::TchError> {
    if let Some(size) = geometry.resize {
        let kind = images.kind();
        let sides = [size.height as i64, size.width as i64];
        images = images.f_to_kind(Kind::Float)?.f_internal_upsample_bilinear2d_aa(sides, false, None, None)?;
        if kind == Kind::Uint8 {
            images = images.f_round()?.f_clamp(0, 255)?.f_to_kind(kind)?;
        }
    }
    if let Some(Crop { top, left, size }) = geometry.crop {
        images = images.f_narrow(2, top as i64, size.height as i64)?.f_narrow(3, left as i64, size.width as i64)?;
    }
    Ok(images)
}

/// Conversion to float32, then scale, mean and std per channel (axis 1); the result is contiguous.
pub(super) fn normalize(place: &Place, stored: Tensor, transform: &Transform) -> Result<Tensor, Error> {
    normalized(stored, transform).map_err(Error::libtorch(place))
}

fn normalized(stored: Tensor, transform: &Transform) -> Result<Tensor, tch::TchError> {
    let mut tensor = stored.f_to_kind(Kind::Float)?.f_contiguous()?;
    // Nobody else holds the tensor that came in, so that even where it was float32 its memory can be written.
    drop(stored);
    let rank = tensor.dim();
    if let Some(scale) = transform.scale {
        tensor = tensor.f_mul_scalar_(scale)?;
    }
    if let Some(mean) = &transform.mean {
        tensor = tensor.f_sub_(&per_channel(mean, rank)?)?;
    }
    if let Some(std) = &transform.std {
        tensor = tensor.f_div_(&per_channel(std, rank)?)?;
    }
    Ok(tensor)
}

/// `values` along axis 1 of a tensor of `rank` axes; a single value along all.
fn per_channel(values: &[f64], rank: usize) -> Result<Tensor, tch::TchError> {
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    let trailing = rank.saturating_sub(2);
    let mut shape = vec![values.len() as i64];
    shape.extend(std::iter::repeat_n(1, trailing));
    Tensor::f_from_slice(&values)?.f_view(shape.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(height: usize, width: usize) -> Size {
        Size { height, width }
    }

    #[test]
    fn the_long_side_is_rounded_down() {
        assert_eq!(resized(size(3, 7), 5), size(5, 11));
        assert_eq!(resized(size(7, 3), 5), size(11, 5));
        assert_eq!(resized(size(480, 640), 256), size(256, 341));
    }

    #[test]
    fn halves_of_the_margin_go_to_even_numbers() {
        let starts = [5, 6, 7, 8, 9].map(|side| centre(size(side, 4), size(4, 4)).map(|crop| (crop.top, crop.left)));
        assert_eq!(starts, [(0, 0), (1, 0), (2, 0), (2, 0), (2, 0)].map(Some));
        assert_eq!(centre(size(3, 4), size(4, 4)), None);
    }

    #[test]
    fn an_image_like_a_thread_is_not_enlarged_without_bound() {
        let place = Place { path: "a.png".into(), tensor: "images".to_owned() };
        let transform = Transform { resize: Some(u32::MAX), ..Transform::default() };
        assert!(geometry(&place, size(1, 65_535), &transform).is_err());
    }
}
