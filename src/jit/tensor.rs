//! Tensors across the seam: tch's handle and C++'s `at::Tensor` are the same object behind two types.

#![allow(unsafe_code)]

use cxx::UniquePtr;
use tch::Tensor;

use super::Error;
use super::ffi::bridge;

/// The values of a float32 tensor that fill its memory without gaps.
#[derive(Debug, Clone, Copy)]
pub struct Dense<'a> {
    /// In memory order.
    pub values: &'a [f32],
    /// Size along each axis.
    pub sizes: &'a [i64],
    /// Distance in memory between neighbours along each axis, in values.
    pub strides: &'a [i64],
}

/// Lends the values of a float32 tensor as a slice: in memory order, without a copy, wherever they lie without gaps on the
/// CPU; else a contiguous copy.
///
/// # Errors
/// For a tensor of another dtype.
pub fn with_values<R>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> R) -> Result<R, Error> {
    with_dense(tensor, |dense| read(dense.values))
}

/// Like [`with_values`], and says how the values lie.
///
/// # Errors
/// For a tensor of another dtype.
pub fn with_dense<R>(tensor: &Tensor, read: impl FnOnce(Dense<'_>) -> R) -> Result<R, Error> {
    let kind = tensor.f_kind()?;
    if kind != tch::Kind::Float {
        return Err(Error::Libtorch(format!("expected a float32 tensor, found {kind:?}")));
    }
    let here = tensor.f_to_device(tch::Device::Cpu)?;
    let dense = if bridge::is_dense(as_bridge(&here)) { here } else { here.f_contiguous()? };
    let (sizes, strides) = (dense.size(), dense.stride());
    if dense.numel() == 0 {
        return Ok(read(Dense { values: &[], sizes: &sizes, strides: &strides }));
    }
    // SAFETY: the tensor is float32, on the CPU and dense, so that numel() values lie at data_ptr(), which is the lowest
    // address as strides are not negative; `dense` keeps them alive, and nothing writes while `read` runs, since the
    // interpreter waits for it.
    let values = unsafe { std::slice::from_raw_parts(dense.data_ptr().cast::<f32>(), dense.numel()) };
    Ok(read(Dense { values, sizes: &sizes, strides: &strides }))
}

/// Lends the values of two float32 tensors of one shape as slices in the same order.
///
/// # Errors
/// For tensors of another dtype or of different shapes.
pub fn with_pairs<R>(a: &Tensor, b: &Tensor, read: impl FnOnce(&[f32], &[f32]) -> R) -> Result<R, Error> {
    if a.size() != b.size() {
        return Err(Error::Libtorch(format!("expected tensors of one shape, found {:?} and {:?}", a.size(), b.size())));
    }
    let is_same_order = a.stride() == b.stride() && bridge::is_dense(as_bridge(a)) && bridge::is_dense(as_bridge(b));
    let pair =
        if is_same_order { [a.shallow_clone(), b.shallow_clone()] } else { [a.f_contiguous()?, b.f_contiguous()?] };
    with_values(&pair[0], |a| with_values(&pair[1], |b| read(a, b)))?
}

/// Borrows what a tch tensor points to.
pub(super) fn as_bridge(tensor: &Tensor) -> &bridge::Tensor {
    let pointer = tensor.as_ptr().cast::<bridge::Tensor>();
    // SAFETY: torch-sys declares C_tensor as the opaque name of at::Tensor, tch keeps the pointer non-null and alive as
    // long as `tensor`, and the reference returned borrows `tensor`.
    unsafe { &*pointer }
}

/// A second handle to the same storage.
pub(super) fn from_bridge(tensor: &bridge::Tensor) -> Tensor {
    let pointer = std::ptr::from_ref(tensor).cast_mut().cast();
    // SAFETY: the pointer comes from a live reference to an at::Tensor; libtorch copies the handle and does not write
    // through the pointer.
    unsafe { Tensor::clone_from_ptr(pointer) }
}

/// Gives a tensor to C++.
pub(super) fn into_bridge(tensor: Tensor) -> UniquePtr<bridge::Tensor> {
    let tensor = std::mem::ManuallyDrop::new(tensor);
    let pointer = tensor.as_ptr().cast_mut().cast::<bridge::Tensor>();
    // SAFETY: tch allocates its tensors with C++'s `new at::Tensor`, as UniquePtr's `delete` expects, and ManuallyDrop
    // leaves C++ as the only owner.
    unsafe { UniquePtr::from_raw(pointer) }
}

/// A list for C++.
pub(super) fn list<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> UniquePtr<bridge::Tensors> {
    let mut list = bridge::new_tensors();
    for tensor in tensors {
        bridge::push_tensor(list.pin_mut(), as_bridge(tensor));
    }
    list
}

/// Takes a tensor from C++.
pub(super) fn from_unique(tensor: UniquePtr<bridge::Tensor>) -> Tensor {
    let pointer = tensor.into_raw().cast();
    // SAFETY: the pointer was made by C++'s `new at::Tensor` and nothing else owns it; tch frees it with `delete`.
    unsafe { Tensor::from_ptr(pointer) }
}
