//! Simulated quantization of tensors: the arithmetic of [`quantizer`](crate::quantizer) written as tensor ops, for any
//! device. It decides nothing.

use tch::Tensor;

use crate::jit::{BoxError, Tap, TapKind, Visit};
use crate::quantizer::QuantParams;
use crate::sites::ActivationSite;

/// The quantized image of a float32 tensor, bit for bit that of [`QuantParams::fake_quantize`] and of libtorch's
/// `fake_quantize_per_tensor_affine`, which takes about 20 times as long on a CPU.
///
/// # Errors
/// Where libtorch fails.
pub fn fake_quantize(tensor: &Tensor, params: &QuantParams) -> Result<Tensor, tch::TchError> {
    let scale = f64::from(params.scale());
    // Rounded to f32 before it multiplies, as the kernel does.
    let inverse = f64::from(1.0f32 / params.scale());
    let zero_point = f64::from(params.zero_point());
    let (min, max) = (f64::from(params.quant_min()), f64::from(params.quant_max()));
    // Adding a zero point of 0 still matters: it makes −0.0 positive, as the kernel does.
    let image = tensor.f_mul_scalar(inverse)?.f_round_()?.f_add_scalar_(zero_point)?.f_clamp_(min, max)?;
    let mut image = if params.zero_point() == 0 { image } else { image.shallow_clone().f_sub_scalar_(zero_point)? };
    image.f_mul_scalar_(scale)
}

/// Taps that [`Simulate`] answers at the values of these sites, and its quantizers; a site without one stays float.
#[must_use]
pub fn substitutes(sites: &[ActivationSite], quantizers: &[Option<QuantParams>]) -> (Vec<Tap>, Vec<QuantParams>) {
    let sites = sites.iter().zip(quantizers).filter_map(|(site, quantizer)| Some((site, (*quantizer)?)));
    let anchors = sites.flat_map(|(site, quantizer)| {
        let kind = if site.is_returned { TapKind::Substitute } else { TapKind::SubstituteInside };
        site.anchors.iter().map(move |anchor| (anchor.value, kind, quantizer))
    });
    let tap = |(number, (value, kind, quantizer))| (Tap { value, number, kind }, quantizer);
    anchors.enumerate().map(tap).unzip()
}

/// Replaces each tapped value by its quantized image; tap i has the quantizer `params[i]`.
pub struct Simulate<'a> {
    /// One quantizer per tap.
    pub params: &'a [QuantParams],
}

impl Visit for Simulate<'_> {
    fn substitute(&mut self, tap: usize, value: &Tensor) -> Result<Tensor, BoxError> {
        let params = self.params.get(tap).ok_or_else(|| format!("tap {tap} has no quantizer"))?;
        Ok(fake_quantize(value, params)?)
    }
}
