//! Linears that a library has quantized: what the configuration says about them, and where their parts are stored.
//!
//! Nothing is rounded here. The parts of the checkpoint hold the library's own integers, zeros and scales, and only
//! their places differ. A format is one file; [`words`] takes their packed words apart.

pub mod awq;
pub mod compressed;
pub mod gptq;
pub mod words;

use std::fmt;
use std::path::Path;

use mixtral_checkpoint::KeyError;
use mixtral_checkpoint::keys::{Keys, parse_object, read_text};
use mixtral_model::{Bits, DType, PartKind, Quantization, WeightFormat};

use super::view::View;

/// What is read, for messages.
pub const READ: &str = "AutoAWQ's gemm (4 bits), GPTQ (4 bits) and compressed-tensors (pack-quantized and int-quantized weights of 4 or 8 bits)";

/// The groups that are read.
const GROUPS: &str = "32, 64, 128, or -1 for whole rows";

/// How a configuration says that linears are quantized. The files tell the type of the scales.
#[derive(Clone, Copy, Debug)]
pub struct Scheme {
    /// How the library stores them.
    pub packing: &'static dyn Packing,
    /// Size of an integer.
    pub bits: Bits,
    /// Inputs that share a scale; `None` is all inputs.
    pub group: Option<usize>,
    /// Whether they have zeros of their own.
    pub zeros: bool,
}

impl Scheme {
    /// Scales of a row with `inputs` elements.
    #[must_use]
    pub fn groups(&self, inputs: usize) -> usize {
        self.group.map_or(1, |group| inputs.div_ceil(group))
    }
}

/// How linears are stored that are quantized.
#[derive(Clone, Copy, Debug)]
pub struct Quantized {
    /// What the configuration says.
    pub scheme: Scheme,
    /// Type of the scales, which only the files tell.
    pub scale: DType,
}

impl Quantized {
    /// Their format in the checkpoint.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        let Scheme { bits, group, zeros, .. } = self.scheme;
        WeightFormat::Quantized(Quantization { bits, group, zeros, scale: self.scale })
    }
}

/// The way in which a library stores a quantized linear: each part is one tensor.
pub trait Packing: fmt::Debug + Sync {
    /// Its name in messages.
    fn name(&self) -> &'static str;

    /// Where the parts of a linear `[outputs, inputs]` are.
    fn parts(&self, scheme: &Scheme, shape: [usize; 2]) -> Vec<StoredPart>;

    /// The tensors that a linear may have beside its parts.
    fn beside(&self, _scheme: &Scheme, _shape: [usize; 2]) -> Vec<Beside> {
        Vec::new()
    }
}

/// Where a part of a linear is stored.
#[derive(Clone, Debug)]
pub struct StoredPart {
    /// Which part.
    pub kind: PartKind,
    /// The tensor's name after that of the linear.
    pub suffix: &'static str,
    /// Its element type, as safetensors spells it; `None` for any float type.
    pub dtype: Option<&'static str>,
    /// Its shape.
    pub shape: Vec<usize>,
    /// How the part lies in it.
    pub view: View,
}

impl StoredPart {
    fn new(kind: PartKind, suffix: &'static str, dtype: Option<&'static str>, shape: [usize; 2], view: View) -> Self {
        StoredPart { kind, suffix, dtype, shape: shape.to_vec(), view }
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

/// The schemes that a model directory describes; none if no library is named, or another one. There are several if
/// linears differ. Their tensors then tell which linear has which.
///
/// # Errors
/// If it describes something that is not read.
pub fn schemes(config: &Path) -> Result<Vec<Scheme>, KeyError> {
    let root = parse_object(&read_text(config)?, config)?;
    let keys = Keys::new(config, &root);
    if keys.contains("quantization_config") {
        let keys = keys.object("quantization_config", "quantization_config.")?;
        return match keys.text("quant_method")? {
            Some("awq") => Ok(vec![awq::scheme(keys)?]),
            Some("gptq") => Ok(vec![gptq::scheme(keys)?]),
            Some("compressed-tensors") => compressed::schemes(keys),
            _ => Ok(Vec::new()),
        };
    }
    // Older versions of the libraries wrote a file of their own.
    type Read = fn(Keys<'_>) -> Result<Scheme, KeyError>;
    for (name, read) in [("quantize_config.json", gptq::scheme as Read), ("quant_config.json", awq::scheme)] {
        let path = config.with_file_name(name);
        if path.exists() {
            return Ok(vec![read(Keys::new(&path, &parse_object(&read_text(&path)?, &path)?))?]);
        }
    }
    Ok(Vec::new())
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
