//! Second moments of what an op reads and gives, summed up as it comes: all that the rounding of its weights needs to know of the
//! data, in memory that does not grow with it.

use tch::{Device, Kind, Tensor};

/// Sums over positions of an input x and of what is missing in the result, r, each position with a weight of its own; float64.
#[derive(Debug, Default)]
pub(super) struct Moments(Option<Sums>);

#[derive(Debug)]
struct Sums {
    /// Σ weights: (groups).
    weight: Tensor,
    /// Σ x: (groups, features).
    x: Tensor,
    /// Σ r: (groups, outputs).
    r: Tensor,
    /// Σ x·xᵀ: (groups, features, features).
    xx: Tensor,
    /// Σ x·rᵀ: (groups, features, outputs).
    xr: Tensor,
    /// Σ r²: (groups, outputs).
    rr: Tensor,
}

/// Means of products, on the CPU.
#[derive(Debug)]
pub(super) struct Means {
    /// E(x): (groups, features).
    pub(super) x: Tensor,
    /// E(x·xᵀ), or what is left of it without the means: (groups, features, features).
    pub(super) xx: Tensor,
    /// E(x·rᵀ): (groups, features, outputs).
    pub(super) xr: Tensor,
    /// E(r²): (groups, outputs).
    pub(super) rr: Tensor,
}

impl Moments {
    /// Adds x (groups, features, positions) and r (groups, outputs, positions); `weights` is (groups, positions). They are the groups from
    /// `first` on of `all`.
    pub(super) fn add(
        &mut self,
        (first, all): (i64, i64),
        x: &Tensor,
        r: &Tensor,
        weights: Option<&Tensor>,
    ) -> Result<(), tch::TchError> {
        let along = |value: &Tensor| value.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
        let (weighted_x, weighted_r) = match weights {
            None => (x.shallow_clone(), r.shallow_clone()),
            Some(weights) => (x.f_mul(&weights.f_unsqueeze(1)?)?, r.f_mul(&weights.f_unsqueeze(1)?)?),
        };
        let [groups, features, positions] = <[i64; 3]>::try_from(x.size()).unwrap_or_default();
        let outputs = r.size().get(1).copied().unwrap_or(1);
        let weight = match weights {
            None => Tensor::f_full([groups], positions as f64, (Kind::Double, x.device()))?,
            Some(weights) => along(weights)?,
        };
        let more = [
            weight,
            along(&weighted_x)?,
            along(&weighted_r)?,
            weighted_x.f_bmm(&x.f_transpose(1, 2)?)?,
            weighted_x.f_bmm(&r.f_transpose(1, 2)?)?,
            along(&weighted_r.f_mul(r)?)?,
        ];
        if self.0.is_none() {
            let none = |size: &[i64]| Tensor::f_zeros(size, (Kind::Double, x.device()));
            self.0 = Some(Sums {
                weight: none(&[all])?,
                x: none(&[all, features])?,
                r: none(&[all, outputs])?,
                xx: none(&[all, features, features])?,
                xr: none(&[all, features, outputs])?,
                rr: none(&[all, outputs])?,
            });
        }
        let Some(Sums { weight, x, r, xx, xr, rr }) = &self.0 else { return Ok(()) };
        for (sum, more) in [weight, x, r, xx, xr, rr].into_iter().zip(more) {
            let _ = sum.f_narrow(0, first, groups)?.f_add_(&more)?;
        }
        Ok(())
    }

    /// With the sums of other positions.
    pub(super) fn with(&self, other: &Self) -> Result<Self, tch::TchError> {
        let (Some(own), Some(other)) = (&self.0, &other.0) else { return Ok(Self::default()) };
        let sum = |own: &Tensor, other: &Tensor| own.f_add(other);
        Ok(Self(Some(Sums {
            weight: sum(&own.weight, &other.weight)?,
            x: sum(&own.x, &other.x)?,
            r: sum(&own.r, &other.r)?,
            xx: sum(&own.xx, &other.xx)?,
            xr: sum(&own.xr, &other.xr)?,
            rr: sum(&own.rr, &other.rr)?,
        })))
    }

    /// The means; `is_centred`: those of x − E(x) and r − E(r). `None` where nothing was added.
    pub(super) fn means(self, is_centred: bool) -> Result<Option<Means>, tch::TchError> {
        let Some(Sums { weight, x, r, xx, xr, rr }) = self.0 else { return Ok(None) };
        // A group whose weights are all zero has no mean.
        let weight = weight.f_clamp_min(f64::MIN_POSITIVE)?;
        let by = |sum: &Tensor, axes: &[i64]| sum.f_div(&weight.f_reshape(axes)?)?.f_to_device(Device::Cpu);
        let (x, r) = (by(&x, &[-1, 1])?, by(&r, &[-1, 1])?);
        let (mut xx, mut xr, mut rr) = (by(&xx, &[-1, 1, 1])?, by(&xr, &[-1, 1, 1])?, by(&rr, &[-1, 1])?);
        if is_centred {
            let column = x.f_unsqueeze(2)?;
            xx = xx.f_sub(&column.f_bmm(&x.f_unsqueeze(1)?)?)?;
            xr = xr.f_sub(&column.f_bmm(&r.f_unsqueeze(1)?)?)?;
            rr = rr.f_sub(&r.f_square()?)?.f_clamp_min(0.0)?;
        }
        Ok(Some(Means { x, xx, xr, rr }))
    }
}
