//! How a linear's weight lies on the device, as its kernels see it. This is the Rust side of `kernels/weight/`; each
//! variant of [`WeightRows`] has a header there.

use mixtral_engine::{Op, Program, Weight};
use mixtral_model::{Bits, DType, ElemType, Fp8Input, Quantization, WeightFormat};

use crate::lower::type_name;

/// A format with its element types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightRows {
    /// `weight::Plain`: elements of this type, one after another.
    Plain(DType),
    /// `weight::Quantized`: integers that stand for elements of this type, in the order of the device.
    Quantized(DType, Quantization),
    /// `weight::Fp8`: floats of 8 bits, in a model of this type. Tokens are rounded to 8 bits before the linear.
    Fp8(DType),
    /// `weight::Fp8Rows`: the same with a scale for each row, and perhaps for each token.
    Fp8Rows(DType, Fp8Input),
}

/// Rows of a slab.
const SLAB: usize = 16;

/// Elements of a row in a block.
const BLOCK: usize = 128;

impl WeightRows {
    /// The format of `weight`; `None` if it has no kernels.
    #[must_use]
    pub fn of(weight: &Weight) -> Option<Self> {
        match weight.format {
            WeightFormat::Plain => Some(WeightRows::Plain(weight.dtype)),
            WeightFormat::Fp8 => Some(WeightRows::Fp8(weight.dtype)),
            WeightFormat::Fp8Rows(input) => Some(WeightRows::Fp8Rows(weight.dtype, input)),
            WeightFormat::Quantized(quantization) => matches!(quantization.group, None | Some(32 | 64 | 128))
                .then_some(WeightRows::Quantized(weight.dtype, quantization)),
        }
    }

    /// The type of the elements that the weight stands for.
    #[must_use]
    pub const fn dtype(self) -> DType {
        match self {
            WeightRows::Plain(dtype)
            | WeightRows::Quantized(dtype, _)
            | WeightRows::Fp8(dtype)
            | WeightRows::Fp8Rows(dtype, _) => dtype,
        }
    }

    /// The type of the stored elements, if rows are elements one after another.
    #[must_use]
    pub fn element(self) -> ElemType {
        match self {
            WeightRows::Plain(dtype) => dtype.into(),
            WeightRows::Quantized(..) => ElemType::U8,
            WeightRows::Fp8(_) | WeightRows::Fp8Rows(..) => ElemType::F8E4M3,
        }
    }

    /// The type of the token rows that kernels read, if the operation's input is of type `tokens`.
    #[must_use]
    pub const fn tokens(self, tokens: ElemType) -> ElemType {
        if self.is_fp8() { ElemType::F8E4M3 } else { tokens }
    }

    /// Whether the linear's input is rounded to 8 bits.
    #[must_use]
    pub const fn is_fp8(self) -> bool {
        matches!(self, WeightRows::Fp8(_) | WeightRows::Fp8Rows(..))
    }

    /// Whether each row of the input is rounded by a scale of its own.
    #[must_use]
    pub const fn scales_tokens(self) -> bool {
        matches!(self, WeightRows::Fp8Rows(_, Fp8Input::Token))
    }

    /// Whether there are kernels that multiply a weight of this format with tokens of type `tokens` on tensor cores.
    #[must_use]
    pub fn suits_tensor_cores(self, tokens: ElemType) -> bool {
        matches!(self.dtype(), DType::F16 | DType::Bf16) && tokens == self.dtype().into()
    }

    /// Whether the weight lies on the device in another order than in its file.
    #[must_use]
    pub const fn is_packed(self) -> bool {
        matches!(self, WeightRows::Quantized(..))
    }

    /// Whether a thread needs registers for two sets of sums: those of a group or a block, and all so far.
    #[must_use]
    pub const fn has_two_sums(self) -> bool {
        !matches!(self, WeightRows::Plain(_))
    }

    /// Elements along K that share a scale, if not all of a row do. Their sums are scaled and added up.
    #[must_use]
    pub const fn group(self) -> Option<usize> {
        match self {
            WeightRows::Quantized(_, Quantization { group, .. }) => group,
            _ => None,
        }
    }

    /// Whether sums are scaled and added up group by group.
    #[must_use]
    pub const fn has_groups(self) -> bool {
        self.group().is_some()
    }

    /// Elements of K in a block of a packed weight, and in a row of a plain one that TMA swizzles: the least that a stage
    /// has.
    #[must_use]
    pub const fn stage_depth(self) -> usize {
        match self {
            WeightRows::Plain(_) => 64,
            WeightRows::Quantized(..) | WeightRows::Fp8(_) | WeightRows::Fp8Rows(..) => BLOCK,
        }
    }

    /// Bytes of such a stage's `rows` rows, of a 16-bit model.
    #[must_use]
    pub fn stage_bytes(self, rows: usize) -> usize {
        match self {
            WeightRows::Plain(_) | WeightRows::Fp8(_) | WeightRows::Fp8Rows(..) => {
                rows * self.stage_depth() * self.element().size()
            }
            WeightRows::Quantized(..) => rows / SLAB * self.block_bytes(),
        }
    }

    /// Bytes of a block of a slab; 0 if the format has no slabs.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        let WeightRows::Quantized(_, quantization) = self else { return 0 };
        let integers = SLAB * BLOCK / quantization.bits.per_byte();
        let groups = quantization.group.map_or(0, |group| BLOCK / group);
        let bytes = integers + SLAB * groups * (quantization.scale.size() + usize::from(quantization.zeros));
        bytes.next_multiple_of(16 * self.parts())
    }

    /// In how many parts TMA copies a block.
    #[must_use]
    pub const fn parts(self) -> usize {
        match self {
            WeightRows::Plain(_) | WeightRows::Fp8(_) | WeightRows::Fp8Rows(..) => 1,
            WeightRows::Quantized(_, Quantization { bits: Bits::Four, .. }) => 2,
            WeightRows::Quantized(_, Quantization { bits: Bits::Eight, .. }) => 4,
        }
    }

    /// Bytes of the values of a row that lie behind the slabs.
    fn row_values(self) -> usize {
        match self {
            WeightRows::Quantized(_, Quantization { group: None, zeros, .. }) => 4 * (1 + usize::from(zeros)),
            _ => 0,
        }
    }
}

/// Where the parts of a weight lie on the device that is not packed, in bytes from its start, and the bytes of all of them.
/// They lie one after another, each at a multiple of 4 bytes.
#[must_use]
pub fn part_offsets(weight: &Weight) -> (Vec<usize>, usize) {
    let mut end = 0usize;
    let starts = weight.format.parts(weight.dtype, &weight.shape).into_iter().map(|part| {
        let start = end.next_multiple_of(4);
        end = start + part.num_bytes();
        start
    });
    let starts = starts.collect();
    (starts, end)
}

/// Where a linear's weight lies, and which kernels read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// The format.
    pub format: WeightRows,
    /// Matrices.
    pub experts: usize,
    /// Rows of each.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Whether a slab has eight rows of a matrix's first half and eight of its second half: silu·mul follows.
    pub interleaved: bool,
}

impl Packing {
    /// The packing of weight `index`; `None` if it has no kernels.
    #[must_use]
    pub fn of(program: &Program, index: usize) -> Option<Packing> {
        let weight = program.weights.get(index)?;
        let experts = if weight.shape.len() == 3 { weight.shape[0].max(1) } else { 1 };
        let interleaved = program
            .ops
            .iter()
            .any(|op| matches!(op, Op::ExpertGateUp { weight: name, silu_mul: true, .. } if *name == weight.name));
        let format = WeightRows::of(weight)?;
        Some(Packing { format, experts, rows: weight.rows() / experts, cols: weight.cols(), interleaved })
    }

    /// Slabs of a matrix.
    #[must_use]
    pub const fn slabs(&self) -> usize {
        if self.interleaved { (self.rows / 2).div_ceil(SLAB / 2) } else { self.rows.div_ceil(SLAB) }
    }

    /// Blocks of a slab.
    #[must_use]
    pub const fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    fn slab_bytes(&self) -> usize {
        self.blocks() * self.format.block_bytes()
    }

    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let elements = self.experts * self.rows * self.cols * self.format.element().size();
        match self.format {
            WeightRows::Plain(_) => elements,
            WeightRows::Fp8(_) | WeightRows::Fp8Rows(..) => {
                elements.next_multiple_of(4) + 4 * (self.scales() + usize::from(!self.format.scales_tokens()))
            }
            WeightRows::Quantized(..) => {
                let slabs = self.experts * self.slabs();
                slabs * (self.slab_bytes() + SLAB * self.format.row_values())
            }
        }
    }

    /// Bytes before a row. A packed weight is only divided between slabs.
    #[must_use]
    pub fn offset(&self, row: usize) -> Option<usize> {
        match self.format {
            WeightRows::Plain(_) | WeightRows::Fp8(_) | WeightRows::Fp8Rows(..) => {
                Some(row * self.cols * self.format.element().size())
            }
            WeightRows::Quantized(..) => {
                (row == 0 || !self.interleaved && row.is_multiple_of(SLAB)).then_some(row / SLAB * self.slab_bytes())
            }
        }
    }

    /// Scales of an fp8 weight, without the input's.
    const fn scales(&self) -> usize {
        match self.format {
            WeightRows::Fp8Rows(..) => self.experts * self.rows,
            _ => self.experts,
        }
    }

    /// Bytes before the scale of the input, of an fp8 weight whose tokens have no scales of their own. It lies behind the weight's.
    #[must_use]
    pub fn input_scale(&self) -> usize {
        self.bytes() - 4
    }

    /// The type in `kernels/weight/` that kernels are instantiated with. They are given the address of `row`.
    #[must_use]
    pub fn symbol(&self, row: usize) -> String {
        let (dtype, Quantization { bits, group, zeros, scale }) = match self.format {
            WeightRows::Plain(dtype) => return format!("weight::Plain<{}>", type_name(dtype)),
            WeightRows::Fp8(dtype) => {
                let scales = self.input_scale() - 4 * self.experts - row * self.cols;
                return format!("weight::Fp8<{}, {}, {scales}>", type_name(dtype), self.experts);
            }
            WeightRows::Fp8Rows(dtype, input) => {
                let behind = |at: usize| at - row * self.cols;
                let scales = behind((self.experts * self.rows * self.cols).next_multiple_of(4) + 4 * row);
                let input = match input {
                    Fp8Input::Static => behind(self.input_scale()).to_string(),
                    Fp8Input::Token => "-1".to_owned(),
                };
                return format!("weight::Fp8Rows<{}, {scales}, {input}>", type_name(dtype));
            }
            WeightRows::Quantized(dtype, quantization) => (dtype, quantization),
        };
        let bits = match bits {
            Bits::Four => 4,
            Bits::Eight => 8,
        };
        // Scales of rows are f32 on the device, behind all slabs.
        let (scale, behind) = match group {
            Some(_) => (scale, 0),
            None => {
                let slabs = self.experts * self.slabs() - row / SLAB;
                (DType::F32, slabs * self.slab_bytes() + row * self.format.row_values())
            }
        };
        let (dtype, scale, group) = (type_name(dtype), type_name(scale), group.unwrap_or(0));
        format!("weight::Quantized<{dtype}, {bits}, {group}, {zeros}, {scale}, {behind}>")
    }
}

#[cfg(test)]
impl WeightRows {
    /// Packed rows of a bf16 model, by the name of their format.
    pub(crate) fn packed(word: &str) -> WeightRows {
        let Ok(WeightFormat::Quantized(quantization)) = word.parse() else { panic!("{word}") };
        WeightRows::Quantized(DType::Bf16, quantization)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_rows_are_their_elements() {
        for (dtype, bytes, name) in
            [(DType::F32, 400, "float"), (DType::F16, 200, "f16_t"), (DType::Bf16, 200, "bf16_t")]
        {
            let format = WeightRows::Plain(dtype);
            let packing = Packing { format, experts: 2, rows: 3, cols: 100, interleaved: false };
            assert_eq!((packing.offset(1), packing.bytes()), (Some(bytes), 6 * bytes));
            assert_eq!(packing.symbol(0), format!("weight::Plain<{name}>"));
            for tokens in [DType::F32, DType::F16, DType::Bf16] {
                assert_eq!(format.suits_tensor_cores(tokens.into()), dtype == tokens && dtype != DType::F32);
            }
        }
    }

    #[test]
    fn scales_of_fp8_lie_behind_the_elements() {
        let format = WeightRows::Fp8(DType::Bf16);
        let packing = Packing { format, experts: 3, rows: 5, cols: 21, interleaved: false };
        // 315 bytes of elements, three scales and the input's.
        assert_eq!((packing.bytes(), packing.input_scale(), packing.offset(2)), (332, 328, Some(42)));
        assert_eq!(packing.symbol(0), "weight::Fp8<bf16_t, 3, 316>");
        assert_eq!(packing.symbol(2), "weight::Fp8<bf16_t, 3, 274>");
        let weight = Weight {
            name: "w".to_owned(),
            dtype: DType::Bf16,
            format: WeightFormat::Fp8,
            shape: vec![3, 5, 21],
            pieces: vec![],
            sharded: None,
        };
        assert_eq!(part_offsets(&weight), (vec![0, 316, 328], 332));
        assert_eq!((format.tokens(ElemType::Bf16), format.element()), (ElemType::F8E4M3, ElemType::F8E4M3));
        assert!(format.suits_tensor_cores(ElemType::Bf16) && !format.suits_tensor_cores(ElemType::F32));
    }

    #[test]
    fn rows_of_fp8_have_scales_behind_the_elements() {
        let packing = |input| {
            let format = WeightRows::Fp8Rows(DType::Bf16, input);
            Packing { format, experts: 3, rows: 5, cols: 21, interleaved: false }
        };
        // 315 bytes of elements, fifteen scales and the input's, unless tokens have scales.
        let (of_all, of_tokens) = (packing(Fp8Input::Static), packing(Fp8Input::Token));
        assert_eq!((of_all.bytes(), of_all.input_scale(), of_tokens.bytes()), (380, 376, 376));
        assert_eq!(of_all.symbol(0), "weight::Fp8Rows<bf16_t, 316, 376>");
        assert_eq!(of_all.symbol(2), "weight::Fp8Rows<bf16_t, 282, 334>");
        assert_eq!(of_tokens.symbol(1), "weight::Fp8Rows<bf16_t, 299, -1>");
    }

    #[test]
    fn packed_weights_are_slabs_of_blocks() {
        let packing = |word, rows, interleaved| {
            let format = WeightRows::packed(word);
            Packing { format, experts: 2, rows, cols: 200, interleaved }
        };
        // Two blocks of 1024 bytes of integers, with 16 scales each.
        let groups = packing("int4:g128:bf16", 33, false);
        assert_eq!((groups.slabs(), groups.blocks(), groups.bytes()), (3, 2, 2 * 3 * 2 * 1056));
        assert_eq!((groups.offset(16), groups.offset(8)), (Some(2 * 1056), None));
        assert_eq!(groups.symbol(16), "weight::Quantized<bf16_t, 4, 128, false, bf16_t, 0>");
        assert_eq!(packing("int4:g32:f32:zeros", 16, false).bytes(), 2 * 2 * (1024 + 4 * 16 * 5));
        // TMA copies blocks in two parts or four, of whole 16 bytes.
        assert_eq!(packing("int4:g128:f16:zeros", 16, false).bytes(), 2 * 2 * (1024 + 16 * 3 + 16));
        assert_eq!(packing("int8:g128:f16:zeros", 16, false).bytes(), 2 * 2 * (2048 + 16 * 3 + 16));
        // The rows' scales lie behind all slabs, with zeros if there are any.
        let rows = packing("int8:row:bf16:zeros", 33, false);
        assert_eq!(rows.bytes(), 6 * (2 * 2048 + 16 * 8));
        assert_eq!(rows.symbol(0), format!("weight::Quantized<bf16_t, 8, 0, true, float, {}>", 6 * 4096));
        assert_eq!(rows.symbol(32), format!("weight::Quantized<bf16_t, 8, 0, true, float, {}>", 4 * 4096 + 32 * 8));
        // A slab has eight rows of each half.
        let halves = packing("int8:row:f32", 2 * 12, true);
        assert_eq!((halves.slabs(), halves.bytes()), (2, 4 * (2 * 2048 + 16 * 4)));
        assert_eq!((halves.offset(0), halves.offset(16)), (Some(0), None));
    }
}
