//! Second moments of what an op reads and gives, summed up as it comes: all that the rounding of its weights needs to know of the
//! data, in memory that does not grow with it.

use tch::{Device, Kind, Tensor};

/// Sums over positions of an input x and a result y, each position with a weight of its own; float64.
#[derive(Debug, Default)]
pub(super) struct Moments(Option<Sums>);

#[derive(Debug)]
struct Sums {
    /// Σ weights: (groups).
    weight: Tensor,
    /// Σ x: (groups, features).
    x: Tensor,
    /// Σ y: (groups, outputs).
    y: Tensor,
    /// Σ x·xᵀ: (groups, features, features).
    xx: Tensor,
    /// Σ x·yᵀ: (groups, features, outputs).
    xy: Tensor,
    /// Σ y²: (groups, outputs).
    yy: Tensor,
}

/// Means of products, on the CPU.
#[derive(Debug)]
pub(super) struct Means {
    /// E(x): (groups, features).
    pub(super) x: Tensor,
    /// E(x·xᵀ), or what is left of it without the means: (groups, features, features).
    pub(super) xx: Tensor,
    /// E(x·yᵀ): (groups, features, outputs).
    pub(super) xy: Tensor,
    /// E(y²): (groups, outputs).
    pub(super) yy: Tensor,
}

impl Moments {
    /// Adds x (groups, features, positions) and y (groups, outputs, positions); `weights` is (groups, positions).
    pub(super) fn add(&mut self, x: &Tensor, y: &Tensor, weights: Option<&Tensor>) -> Result<(), tch::TchError> {
        let double = |sum: Tensor| sum.f_to_kind(Kind::Double);
        let along = |value: &Tensor| double(value.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?);
        let (weighted_x, weighted_y) = match weights {
            None => (x.shallow_clone(), y.shallow_clone()),
            Some(weights) => (x.f_mul(&weights.f_unsqueeze(1)?)?, y.f_mul(&weights.f_unsqueeze(1)?)?),
        };
        let [groups, _, positions] = <[i64; 3]>::try_from(x.size()).unwrap_or_default();
        let weight = match weights {
            None => Tensor::f_full([groups], positions as f64, (Kind::Double, x.device()))?,
            Some(weights) => along(weights)?,
        };
        let more = Sums {
            weight,
            x: along(&weighted_x)?,
            y: along(&weighted_y)?,
            xx: double(weighted_x.f_bmm(&x.f_transpose(1, 2)?)?)?,
            xy: double(weighted_x.f_bmm(&y.f_transpose(1, 2)?)?)?,
            yy: along(&weighted_y.f_mul(y)?)?,
        };
        match &mut self.0 {
            None => self.0 = Some(more),
            Some(sums) => {
                let own = [&mut sums.weight, &mut sums.x, &mut sums.y, &mut sums.xx, &mut sums.xy, &mut sums.yy];
                let more = [&more.weight, &more.x, &more.y, &more.xx, &more.xy, &more.yy];
                for (own, more) in own.into_iter().zip(more) {
                    let _ = own.f_add_(more)?;
                }
            }
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
            y: sum(&own.y, &other.y)?,
            xx: sum(&own.xx, &other.xx)?,
            xy: sum(&own.xy, &other.xy)?,
            yy: sum(&own.yy, &other.yy)?,
        })))
    }

    /// The means; `is_centred`: those of x − E(x) and y − E(y). `None` where nothing was added.
    pub(super) fn means(self, is_centred: bool) -> Result<Option<Means>, tch::TchError> {
        let Some(Sums { weight, x, y, xx, xy, yy }) = self.0 else { return Ok(None) };
        // A group whose weights are all zero has no mean.
        let weight = weight.f_clamp_min(f64::MIN_POSITIVE)?;
        let by = |sum: &Tensor, axes: &[i64]| sum.f_div(&weight.f_reshape(axes)?)?.f_to_device(Device::Cpu);
        let (x, y) = (by(&x, &[-1, 1])?, by(&y, &[-1, 1])?);
        let (mut xx, mut xy, mut yy) = (by(&xx, &[-1, 1, 1])?, by(&xy, &[-1, 1, 1])?, by(&yy, &[-1, 1])?);
        if is_centred {
            let column = x.f_unsqueeze(2)?;
            xx = xx.f_sub(&column.f_bmm(&x.f_unsqueeze(1)?)?)?;
            xy = xy.f_sub(&column.f_bmm(&y.f_unsqueeze(1)?)?)?;
            yy = yy.f_sub(&y.f_square()?)?.f_clamp_min(0.0)?;
        }
        Ok(Some(Means { x, xx, xy, yy }))
    }
}
