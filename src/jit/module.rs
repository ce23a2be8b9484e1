//! A module as loaded: its signature, its tensors, and how arguments are bound to `forward`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cxx::UniquePtr;
use tch::{Device, Tensor};

use super::error::one_line;
use super::ffi::bridge;
use super::value::{Argument, Output};
use super::{Error, Listing, ValueId, clean, device, file};
use crate::names;

/// The arguments and results of `forward`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// Without the module itself.
    pub arguments: Vec<ArgumentType>,
    /// TorchScript types of what it returns.
    pub returns: Vec<String>,
}

/// One argument of `forward`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArgumentType {
    /// Its name.
    pub name: String,
    /// TorchScript type: `Tensor`, `Tensor?`, `int`, …
    pub type_name: String,
    /// Text of its default value, if it has one.
    pub default: Option<String>,
}

/// A parameter or buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedTensor {
    /// Dotted name.
    pub name: String,
    /// libtorch's name of its dtype.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<i64>,
    /// Bytes.
    pub bytes: u64,
    /// A buffer, not a parameter.
    pub is_buffer: bool,
}

/// A parameter, a buffer or another attribute of a module or of one inside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attribute {
    /// Dotted name.
    pub name: String,
    /// `parameter`, `buffer` or `attribute`.
    pub kind: String,
    /// Whether `forward` reads or writes it.
    pub is_used: bool,
}

/// Arguments of one call, checked against the signature, defaults filled in.
pub struct Arguments {
    bound: UniquePtr<bridge::Arguments>,
    description: String,
}

impl Arguments {
    pub(super) fn as_bridge(&self) -> Result<&bridge::Arguments, Error> {
        self.bound.as_ref().ok_or_else(|| Error::Libtorch("an empty handle".to_owned()))
    }

    /// Names, dtypes and shapes, for messages.
    pub(super) fn describe(&self) -> &str {
        &self.description
    }
}

/// A TorchScript module in evaluation mode with float32 tensors.
pub struct Module {
    pub(super) inner: UniquePtr<bridge::Module>,
    path: PathBuf,
    device: Device,
    signature: Signature,
    notes: Vec<String>,
}

impl Module {
    /// Loads a TorchScript file onto the CPU, sets it to evaluation mode and casts its half, bfloat16 and double tensors to
    /// float32; [`Module::notes`] says so where it was needed.
    ///
    /// # Errors
    /// Where the file cannot be read, is no TorchScript, or has no `forward`.
    pub fn load(path: &Path) -> Result<Self, Error> {
        file::check(path)?;
        let text = path.to_str().ok_or_else(|| Error::NotTorchScript {
            path: path.to_owned(),
            found: "a path that is not UTF-8".to_owned(),
            advice: "rename it",
        })?;
        let inner = bridge::load_module(text)
            .map_err(|error| Error::Load { path: path.to_owned(), message: one_line(error.what()) })?;
        let module = inner.as_ref().ok_or_else(|| Error::Libtorch("an empty handle".to_owned()))?;
        if !bridge::has_method(module, "forward")? {
            let methods = bridge::method_names(module)?;
            let found = if methods.is_empty() { "no method at all".to_owned() } else { methods.join(", ") };
            return Err(Error::NoForward { path: path.to_owned(), found });
        }
        let mut notes = Vec::new();
        if bridge::is_training(module)? {
            bridge::set_eval(module)?;
            notes.push("the model was saved in training mode; it was set to evaluation mode".to_owned());
        }
        cast_to_float(module, &mut notes)?;
        let signature = signature(module)?;
        Ok(Self { inner, path: path.to_owned(), device: Device::Cpu, signature, notes })
    }

    /// As [`load`](Self::load), onto any device. On a GPU the code speaks of that GPU where it spoke of another device.
    ///
    /// # Errors
    /// As there, and where the device has no room for it.
    pub fn load_onto(path: &Path, device: Device) -> Result<Self, Error> {
        let mut module = Self::load(path)?;
        if let Some(index) = device::index(device) {
            bridge::move_module(module.as_bridge()?, index)?;
            module.device = device;
        }
        Ok(module)
    }

    /// Where it runs, and where its arguments have to be.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What `forward` takes and returns.
    #[must_use]
    pub fn signature(&self) -> &Signature {
        &self.signature
    }

    /// What loading changed, one sentence each.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Exported methods beside `forward`.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn other_methods(&self) -> Result<Vec<String>, Error> {
        Ok(bridge::method_names(self.as_bridge()?)?.into_iter().filter(|name| name != "forward").collect())
    }

    /// Parameters, then buffers.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn tensors(&self) -> Result<Vec<NamedTensor>, Error> {
        named_tensors(self.as_bridge()?)
    }

    /// All attributes but modules, those that are None, and `training`, which every module has.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn attributes(&self) -> Result<Vec<Attribute>, Error> {
        let rows = bridge::attribute_rows(self.as_bridge()?)?.into_iter();
        Ok(rows.map(|row| Attribute { name: row.name, kind: row.kind, is_used: row.is_used }).collect())
    }

    /// How often each op stands in `forward`, calls inlined, before any clean-up.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn op_counts(&self) -> Result<Vec<(String, usize)>, Error> {
        Ok(bridge::op_counts(self.as_bridge()?)?.into_iter().map(|row| (row.op, row.count)).collect())
    }

    /// Binds arguments, by position (no name) or by name, to `forward`. A whole number serves as a float.
    ///
    /// # Errors
    /// For too many, unknown, repeated or missing arguments and for wrong types.
    pub fn bind(&self, given: Vec<(Option<String>, Argument)>) -> Result<Arguments, Error> {
        let types = &self.signature.arguments;
        let mut bound = bridge::new_arguments();
        let mut filled = BTreeSet::new();
        let mut description = Vec::new();
        for (position, (name, argument)) in given.into_iter().enumerate() {
            let (index, declared) = self.find_argument(position, name.as_deref())?;
            if !filled.insert(index) {
                return Err(Error::Argument(format!("argument `{}` of forward is given twice", declared.name)));
            }
            let argument = adapt(argument, &declared.type_name);
            description.push(format!("{} = {}", declared.name, argument.describe()));
            let value = argument.to_bridge();
            let value = value.as_ref().ok_or_else(|| Error::Libtorch("an empty handle".to_owned()))?;
            bridge::push_named(bound.pin_mut(), &declared.name, value);
        }
        for (index, declared) in types.iter().enumerate() {
            if filled.contains(&index) || declared.default.is_some() {
                continue;
            }
            if !declared.type_name.starts_with("Optional") {
                return Err(Error::Argument(format!(
                    "argument `{}` ({}) of forward is missing; forward takes {}",
                    declared.name,
                    declared.type_name,
                    self.describe_arguments()
                )));
            }
            // An optional argument without a default, as scripting of older models leaves them.
            let none = bridge::value_none();
            let none = none.as_ref().ok_or_else(|| Error::Libtorch("an empty handle".to_owned()))?;
            bridge::push_named(bound.pin_mut(), &declared.name, none);
        }
        bridge::bind_arguments(self.as_bridge()?, bound.pin_mut())
            .map_err(|error| Error::Argument(one_line(error.what())))?;
        Ok(Arguments { bound, description: description.join(", ") })
    }

    /// Runs the original `forward`, without gradients, from the state in the file.
    ///
    /// # Errors
    /// Where the model fails.
    pub fn forward(&self, arguments: &Arguments) -> Result<Output, Error> {
        let output = bridge::call_forward(self.as_bridge()?, arguments.as_bridge()?)
            .map_err(|error| Error::Run { inputs: arguments.describe().to_owned(), message: one_line(error.what()) })?;
        Output::from_bridge(output.as_ref().ok_or_else(|| Error::output("an empty handle"))?)
    }

    /// Cleans the graph and checks on `sample` that it still computes the same; see [`clean::Clean`].
    ///
    /// # Errors
    /// Where the model cannot be frozen, a step fails or changes the result.
    pub fn clean(&self, sample: Option<&Arguments>) -> Result<clean::Clean, Error> {
        self.clean_with(sample, |_| Vec::new())
    }

    /// The same, where values that `aliased` picks of the cleaned graph are returned through `aten::alias`, which reads them: a
    /// quantizer of such a value stands in front of it, where it does not reach what is returned as it is.
    ///
    /// # Errors
    /// As there.
    pub fn clean_with(
        &self,
        sample: Option<&Arguments>,
        aliased: impl FnOnce(&Listing) -> Vec<ValueId>,
    ) -> Result<clean::Clean, Error> {
        clean::Clean::new(self, sample, aliased)
    }

    /// A second handle to the same module.
    pub(super) fn share(&self) -> Result<Self, Error> {
        Ok(Self {
            inner: bridge::share_module(self.as_bridge()?),
            path: self.path.clone(),
            device: self.device,
            signature: self.signature.clone(),
            notes: self.notes.clone(),
        })
    }

    pub(super) fn paths(&self) -> Result<Vec<String>, Error> {
        Ok(bridge::module_paths(self.as_bridge()?)?)
    }

    pub(super) fn as_bridge(&self) -> Result<&bridge::Module, Error> {
        self.inner.as_ref().ok_or_else(|| Error::Libtorch("an empty handle".to_owned()))
    }

    fn describe_arguments(&self) -> String {
        let types = &self.signature.arguments;
        types.iter().map(|argument| format!("{}: {}", argument.name, argument.type_name)).collect::<Vec<_>>().join(", ")
    }

    fn find_argument(&self, position: usize, name: Option<&str>) -> Result<(usize, &ArgumentType), Error> {
        let types = &self.signature.arguments;
        let Some(name) = name else {
            return types.get(position).map(|declared| (position, declared)).ok_or_else(|| {
                Error::Argument(format!(
                    "forward takes {} argument{} ({}), {} or more were given",
                    types.len(),
                    if types.len() == 1 { "" } else { "s" },
                    self.describe_arguments(),
                    position + 1
                ))
            });
        };
        types.iter().enumerate().find(|(_, declared)| declared.name == name).ok_or_else(|| {
            let suggestion = names::did_you_mean(name, types.iter().map(|declared| declared.name.as_str()));
            Error::Argument(format!(
                "forward has no argument `{name}`{suggestion}; it takes {}",
                self.describe_arguments()
            ))
        })
    }
}

/// A tensor on the model's device as an argument of [`Module::bind`].
impl From<Tensor> for Argument {
    fn from(tensor: Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

fn adapt(argument: Argument, type_name: &str) -> Argument {
    match argument {
        // YAML writes the float 2.0 as 2.
        #[allow(clippy::cast_precision_loss)]
        Argument::Int(value) if matches!(type_name, "float" | "Optional[float]") => Argument::Float(value as f64),
        other => other,
    }
}

fn signature(module: &bridge::Module) -> Result<Signature, Error> {
    let arguments = bridge::arguments(module)?;
    let arguments = arguments.into_iter().map(|row| ArgumentType {
        name: row.name,
        type_name: row.type_name,
        default: row.has_default.then_some(row.default_text),
    });
    Ok(Signature { arguments: arguments.collect(), returns: bridge::return_types(module)? })
}

fn named_tensors(module: &bridge::Module) -> Result<Vec<NamedTensor>, Error> {
    let rows = bridge::named_tensors(module)?;
    let tensors = rows.into_iter().map(|row| NamedTensor {
        name: row.name,
        dtype: row.dtype,
        shape: row.shape,
        bytes: row.bytes,
        is_buffer: row.is_buffer,
    });
    Ok(tensors.collect())
}

fn cast_to_float(module: &bridge::Module, notes: &mut Vec<String>) -> Result<(), Error> {
    let tensors = named_tensors(module)?;
    let found: BTreeSet<_> =
        tensors.iter().map(|tensor| tensor.dtype.as_str()).filter(|&t| is_other_float(t)).collect();
    if found.is_empty() {
        return Ok(());
    }
    bridge::cast_to_float(module)?;
    let names = found.into_iter().collect::<Vec<_>>().join(" and ");
    notes.push(format!("the model holds {names} tensors; they were cast to float32"));
    Ok(())
}

fn is_other_float(dtype: &str) -> bool {
    matches!(dtype, "Half" | "BFloat16" | "Double")
}
