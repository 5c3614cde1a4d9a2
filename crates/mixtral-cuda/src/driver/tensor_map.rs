//! TMA descriptors.

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType_enum as DataType, CUtensorMapFloatOOBfill_enum as Fill,
    CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as Promotion,
    CUtensorMapSwizzle_enum as Swizzle,
};
use mixtral_kernels::TensorMap;
use mixtral_model::ElemType;

use super::api;
use crate::CudaError;

/// The most dimensions that a descriptor can have.
const MAX_RANK: usize = 5;

/// Encodes a descriptor of memory at `address`.
pub(crate) fn encode(map: &TensorMap, address: u64) -> Result<CUtensorMap, CudaError> {
    let rank = map.dims.len();
    let wrong = |problem: &str| CudaError::Unsupported(format!("{problem} in tensor map {map:?}"));
    if rank == 0 || rank > MAX_RANK || map.strides.len() != rank - 1 || map.tile.len() != rank {
        return Err(wrong("a number of dimensions that does not fit"));
    }
    let swizzle = match map.swizzle {
        0 => Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        128 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        _ => return Err(wrong("an unknown swizzle")),
    };
    let data_type = match map.dtype {
        ElemType::F32 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        ElemType::F16 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        ElemType::Bf16 => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        ElemType::I32 => DataType::CU_TENSOR_MAP_DATA_TYPE_INT32,
        ElemType::U8 | ElemType::F8E4M3 => DataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
    };
    let api = api()?;
    let mut encoded = CUtensorMap { opaque: [0; 16] };
    let steps = [1u32; MAX_RANK];
    // A map of one dimension has no strides, but the driver needs a pointer all the same.
    let mut strides = [0u64; MAX_RANK];
    strides[..rank - 1].copy_from_slice(&map.strides);
    // SAFETY: the arrays have `rank` elements (strides one less, which is checked above), and the descriptor is aligned
    // by its type. The address is not read through here.
    let code = unsafe {
        (api.cuTensorMapEncodeTiled)(
            &raw mut encoded,
            data_type as u32,
            u32::try_from(rank).unwrap_or(0),
            address as *mut _,
            map.dims.as_ptr(),
            strides.as_ptr(),
            map.tile.as_ptr(),
            steps.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE as u32,
            swizzle as u32,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B as u32,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE as u32,
        )
    };
    api.check("cuTensorMapEncodeTiled", code).map_err(|error| {
        CudaError::Unsupported(format!("{error}, for {map:?} at {address:#x}; this is a bug, please report it"))
    })?;
    Ok(encoded)
}
