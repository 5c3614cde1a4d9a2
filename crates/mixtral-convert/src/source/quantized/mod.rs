//! Linears that a library has quantized: what the configuration says about them, and where their parts are stored.
//!
//! Nothing is rounded here. The parts of the checkpoint hold the library's own numbers, zeros and scales, and only
//! their places differ. A format is one file; [`words`] takes their packed words apart.

pub mod awq;
pub mod compressed;
pub mod fp8;
pub mod gptq;
pub mod words;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use mixtral_checkpoint::KeyError;
use mixtral_checkpoint::keys::{Keys, parse_object, read_text};
use mixtral_model::{CacheFormat, DType, PartKind, WeightFormat};

use super::view::View;

/// What is read, for messages.
pub const READ: &str = "AutoAWQ's gemm (4 bits), GPTQ (4 bits), compressed-tensors (pack-quantized and int-quantized weights of 4 or 8 bits), and fp8 by compressed-tensors, AutoFP8 and ModelOpt (a scale a tensor or a row)";

/// The groups that are read.
const GROUPS: &str = "32, 64, 128, or -1 for whole rows";

/// How a configuration says that linears are quantized, and where the library stores them.
pub type Scheme = Arc<dyn Packing>;

/// How linears are stored that are quantized.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// What the configuration says.
    pub scheme: Scheme,
    /// Their format in the checkpoint. The files tell the type of the scales.
    pub format: WeightFormat,
}

/// The way in which a library stores a quantized linear: each part is one tensor.
pub trait Packing: fmt::Debug + Send + Sync {
    /// Its name in messages.
    fn name(&self) -> &'static str;

    /// The format of the linears in a checkpoint, with scales of the type `scale` if that is open.
    fn format(&self, scale: DType) -> WeightFormat;

    /// Where the parts of a linear `[outputs, inputs]` are.
    fn parts(&self, shape: [usize; 2]) -> Vec<StoredPart>;

    /// The tensors that a linear may have beside its parts.
    fn beside(&self, _shape: [usize; 2]) -> Vec<Beside> {
        Vec::new()
    }
}

/// Scales of a row with `inputs` elements, of which `group` share one; `None` is all of them.
fn groups(group: Option<usize>, inputs: usize) -> usize {
    group.map_or(1, |group| inputs.div_ceil(group))
}

/// Where a part of a linear is stored.
#[derive(Clone, Debug)]
pub struct StoredPart {
    /// Which part.
    pub kind: PartKind,
    /// The tensor's name after that of the linear.
    pub suffix: &'static str,
    /// Its element type, as safetensors spells it; `None` for any float type, which is that of all such parts where the format
    /// names it.
    pub dtype: Option<&'static str>,
    /// Its shape.
    pub shape: Vec<usize>,
    /// How the part lies in it; `None` if it is one number, which holds for all of the linear.
    pub view: Option<View>,
}

impl StoredPart {
    fn new(kind: PartKind, suffix: &'static str, dtype: Option<&'static str>, shape: [usize; 2], view: View) -> Self {
        StoredPart { kind, suffix, dtype, shape: shape.to_vec(), view: Some(view) }
    }

    /// A part that is one number.
    fn number(kind: PartKind, suffix: &'static str) -> Self {
        StoredPart { kind, suffix, dtype: None, shape: vec![1], view: None }
    }
}

/// A tensor that holds nothing of a linear's value, but may say that the linear is not what it seems to be.
#[derive(Clone, Debug)]
pub struct Beside {
    /// The tensor's name after that of the linear.
    pub suffix: &'static str,
    /// Its element type, as safetensors spells it.
    pub dtype: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What its elements must be.
    pub must_be: MustBe,
}

/// What the elements of a tensor must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MustBe {
    /// Anything.
    Anything,
    /// Element `k` is the group of input `k`, and groups follow each other: `k / group`.
    InOrder {
        /// Inputs of a group.
        group: usize,
    },
    /// All words are this one.
    All(u32),
}

impl MustBe {
    /// The index of the first 32-bit word of `bytes` that is something else, and that word.
    #[must_use]
    pub fn first_other(self, bytes: &[u8]) -> Option<(usize, u32)> {
        let mut words = bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).enumerate();
        match self {
            MustBe::Anything => None,
            MustBe::InOrder { group } => words.find(|&(k, word)| word as usize != k / group),
            MustBe::All(expected) => words.find(|&(_, word)| word != expected),
        }
    }
}

/// What a model directory says about its quantization.
#[derive(Debug, Default)]
pub struct Description {
    /// How linears may be quantized; none if no library is named, or another one. There are several if linears differ. Their tensors
    /// then tell which linear has which.
    pub schemes: Vec<Scheme>,
    /// The format of the cache.
    pub cache: CacheFormat,
}

impl From<Scheme> for Description {
    fn from(scheme: Scheme) -> Self {
        Description { schemes: vec![scheme], ..Description::default() }
    }
}

/// Reads what a model directory says about its quantization.
///
/// # Errors
/// If it describes something that is not read.
pub fn describe(config: &Path) -> Result<Description, KeyError> {
    let root = parse_object(&read_text(config)?, config)?;
    let keys = Keys::new(config, &root);
    if keys.contains("quantization_config") {
        let keys = keys.object("quantization_config", "quantization_config.")?;
        return match keys.text("quant_method")? {
            Some("awq") => Ok(awq::scheme(keys)?.into()),
            Some("gptq") => Ok(gptq::scheme(keys)?.into()),
            Some("compressed-tensors") => compressed::describe(keys),
            Some("fp8") => fp8::auto_fp8(keys),
            Some("modelopt") => fp8::model_opt(keys),
            _ => Ok(Description::default()),
        };
    }
    // ModelOpt and older versions of the others write a file of their own.
    type Read = fn(Keys<'_>) -> Result<Description, KeyError>;
    let files = [
        ("hf_quant_config.json", fp8::hf_quant_config as Read),
        ("quantize_config.json", |keys| Ok(gptq::scheme(keys)?.into())),
        ("quant_config.json", |keys| Ok(awq::scheme(keys)?.into())),
    ];
    for (name, read) in files {
        let path = config.with_file_name(name);
        if path.exists() {
            return read(Keys::new(&path, &parse_object(&read_text(&path)?, &path)?));
        }
    }
    Ok(Description::default())
}

/// The size of a group under one of `names`, `default` if there is none.
fn group_size(keys: Keys<'_>, names: &[&str], default: Option<usize>) -> Result<Option<usize>, KeyError> {
    let Some((name, value)) = names.iter().find_map(|name| Some((*name, keys.get(name)?))) else { return Ok(default) };
    match value.as_i64() {
        Some(-1) => Ok(None),
        Some(32) => Ok(Some(32)),
        Some(64) => Ok(Some(64)),
        Some(128) => Ok(Some(128)),
        _ => Err(keys.unsupported(name, GROUPS, value)),
    }
}
