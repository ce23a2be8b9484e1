//! Which kernels the models of a plan run on.

use crate::config::Plan;
use crate::sites::Kernels;

/// 8-bit kernels decide what a site is wherever one of the files is for them.
pub(in crate::pipeline) fn of(plan: &Plan) -> Kernels {
    if plan.output.int8.is_some() { Kernels::Int8 } else { Kernels::Float }
}

/// What a file calls those of a plan.
pub(in crate::pipeline) fn name(plan: &Plan) -> &'static str {
    match of(plan) {
        Kernels::Float => "float",
        Kernels::Int8 => "int8",
    }
}
