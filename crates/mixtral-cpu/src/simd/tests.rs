//! Compares every instruction set with a scalar emulation of the contract, to the bit.

use half::{bf16, f16};
use mixtral_engine::dummy;
use mixtral_model::DType;

use super::{BLOCK_ROWS, Isa, LANES, STREAM_COLUMNS, Simd, WEIGHTED_ROWS};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Seeded values with a magnitude of about 1.
fn values(seed: u64, n: usize) -> Vec<f32> {
    (0..n as u64).map(|i| dummy::element(dummy::key(seed, "x"), i, dummy::scale(1))).collect()
}

fn to_bytes(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The contract's dot, written as the contract says.
fn dot(x: &[f32], w: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    for (i, (x, w)) in x.iter().zip(w).enumerate() {
        lanes[i % 16] = x.mul_add(*w, lanes[i % 16]);
    }
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}

/// Rows padded to whole vectors.
fn pad(x: &[f32], cols: usize, padding: f32) -> Vec<f32> {
    let padded = cols.next_multiple_of(LANES);
    x.chunks(cols).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(padding, padded - cols))).collect()
}

fn sets() -> impl Iterator<Item = (Isa, Simd)> {
    Isa::available().into_iter().filter_map(|isa| Some((isa, Simd::new(isa)?)))
}

#[test]
fn streamed_dots_are_the_contracts() {
    for dtype in DTYPES {
        for cols in [1, 15, 16, 17, 100, 256, 4099] {
            for n in 1..=STREAM_COLUMNS {
                let rows = 11;
                let w: Vec<f32> = values(1, rows * cols).into_iter().map(|x| dtype.round(x)).collect();
                let x = values(2, n * cols);
                let expected: Vec<f32> = x.chunks(cols).flat_map(|x| w.chunks(cols).map(move |w| dot(x, w))).collect();
                for (isa, simd) in sets() {
                    // One byte in front, so that no load is aligned by chance.
                    let mut bytes = vec![0u8];
                    bytes.extend(to_bytes(dtype, &w));
                    let mut out = vec![f32::NAN; n * rows];
                    let padded = pad(&x, cols, -0.0);
                    simd.stream(dtype, &bytes[1..], cols, &padded, cols.next_multiple_of(LANES), n, &mut out, rows);
                    assert_eq!(bits(&out), bits(&expected), "{isa:?} {dtype} cols {cols} n {n}");
                }
            }
        }
    }
}

#[test]
fn blocked_dots_are_the_contracts_wherever_they_lie_in_a_tile() {
    for cols in [1, 15, 16, 17, 100, 515] {
        for n in 1..=13 {
            let rows = 2 * BLOCK_ROWS;
            let (w, x) = (values(3, rows * cols), values(4, n * cols));
            let expected: Vec<f32> = x.chunks(cols).flat_map(|x| w.chunks(cols).map(move |w| dot(x, w))).collect();
            let (bytes_w, bytes_x) = (to_bytes(DType::F32, &w), to_bytes(DType::F32, &x));
            let padded = cols.next_multiple_of(LANES);
            for (isa, simd) in sets() {
                // K in two blocks, cut at some group.
                for cut in [0, 16, padded / 2 / LANES * LANES, padded].map(|cut| cut.min(padded)) {
                    let mut acc = vec![0.0; n * rows * LANES];
                    for (from, to) in [(0, cut), (cut, padded)].into_iter().filter(|(from, to)| from < to) {
                        let (depth, end) = (to - from, to.min(cols));
                        let (mut panel_w, mut panel_x) = (vec![f32::NAN; rows * depth], vec![f32::NAN; n * depth]);
                        for (r, row) in bytes_w.chunks(4 * cols).enumerate() {
                            simd.pack_row(DType::F32, &row[4 * from.min(end)..4 * end], r, depth, &mut panel_w);
                        }
                        for (t, row) in bytes_x.chunks(4 * cols).enumerate() {
                            simd.pack_column(DType::F32, &row[4 * from.min(end)..4 * end], t, n, depth, &mut panel_x);
                        }
                        simd.block(&panel_w, rows, &panel_x, n, depth, &mut acc);
                    }
                    let mut out = vec![f32::NAN; n * rows];
                    simd.reduce(&acc, &mut out);
                    assert_eq!(bits(&out), bits(&expected), "{isa:?} cols {cols} n {n} cut {cut}");
                }
            }
        }
    }
}

#[test]
fn padding_keeps_the_sign_of_zero() {
    // Lane 0 underflows to −0. Padding may not turn it into +0.
    let (w, x) = (vec![-1e-30f32; 17], vec![1e-30f32; 17]);
    let expected = dot(&x, &w);
    let (bytes_w, bytes_x) = (to_bytes(DType::F32, &w), to_bytes(DType::F32, &x));
    let wide_x = pad(&x, 17, -0.0);
    for (isa, simd) in sets() {
        let mut out = [0f32; 1];
        simd.stream(DType::F32, &bytes_w, 17, &wide_x, 32, 1, &mut out, 1);
        assert_eq!(out[0].to_bits(), expected.to_bits(), "{isa:?}");
        let mut acc = vec![0.0; BLOCK_ROWS * LANES];
        let (mut panel_w, mut panel_x) = (vec![f32::NAN; BLOCK_ROWS * 32], vec![f32::NAN; 32]);
        (0..BLOCK_ROWS).for_each(|row| simd.pack_row(DType::F32, &bytes_w, row, 32, &mut panel_w));
        simd.pack_column(DType::F32, &bytes_x, 0, 1, 32, &mut panel_x);
        simd.block(&panel_w, BLOCK_ROWS, &panel_x, 1, 32, &mut acc);
        simd.reduce(&acc, &mut out);
        assert_eq!(out[0].to_bits(), expected.to_bits(), "{isa:?}");
    }
    assert_eq!(expected.to_bits(), (-0.0f32).to_bits());
}

#[test]
fn weighted_rows_are_one_chain_of_fused_multiply_adds() {
    for width in [16, 32, 64, 80, 128, 144] {
        for rows in 1..=WEIGHTED_ROWS {
            for n in [1, 2, 7] {
                let (p, v, start) = (values(5, rows * 9), values(6, n * width), values(7, rows * width));
                let mut expected = start.clone();
                for (c, acc) in expected.chunks_mut(width).enumerate() {
                    for j in 0..n {
                        for (d, acc) in acc.iter_mut().enumerate() {
                            *acc = p[c * 9 + j].mul_add(v[j * width + d], *acc);
                        }
                    }
                }
                for (isa, simd) in sets() {
                    let mut acc = start.clone();
                    simd.weighted_rows(&p, 9, rows, n, &v, width, &mut acc);
                    assert_eq!(bits(&acc), bits(&expected), "{isa:?} width {width} rows {rows} n {n}");
                }
            }
        }
    }
}

/// Values at which wrong roundings would show: ties in both directions, overflow, subnormals, zeros, infinities, NaN.
fn edges() -> Vec<f32> {
    let mut edges: Vec<f32> = [
        0x3f80_8000u32,
        0x3f81_8000,
        0x3f80_8001,
        0x3f80_7fff,
        0x7f7f_ffff,
        0x0000_0001,
        0x0080_0000,
        0x3380_0000,
        0x3300_0000,
        0x3300_0001,
        0x38ff_f000,
        0x477f_efff,
        0x477f_f000,
        0x7fc0_1234,
        0x7f80_0001,
        0x7f80_0000,
    ]
    .map(f32::from_bits)
    .to_vec();
    edges.extend(edges.clone().iter().map(|x| -x));
    edges.extend([0.0, -0.0]);
    edges.extend(values(8, 1000));
    edges
}

#[test]
fn conversions_round_to_nearest_even_everywhere() {
    let edges = edges();
    for dtype in DTYPES {
        let expected = to_bytes(dtype, &edges);
        let widened: Vec<f32> = match dtype {
            DType::F32 => edges.clone(),
            DType::F16 => edges.iter().map(|x| f16::from_f32(*x).to_f32()).collect(),
            DType::Bf16 => edges.iter().map(|x| bf16::from_f32(*x).to_f32()).collect(),
        };
        for (isa, simd) in sets() {
            for n in [1, 15, 16, 17, edges.len()] {
                let mut narrow = vec![0xaa; n * dtype.size()];
                simd.narrow(dtype, &edges[..n], &mut narrow);
                assert_eq!(narrow, expected[..n * dtype.size()], "{isa:?} {dtype}");
                let mut wide = vec![f32::NAN; n];
                simd.widen(dtype, &narrow, &mut wide);
                assert_eq!(bits(&wide), bits(&widened[..n]), "{isa:?} {dtype}");
                let mut rounded = edges[..n].to_vec();
                simd.round(dtype, &mut rounded);
                assert_eq!(bits(&rounded), bits(&widened[..n]), "{isa:?} {dtype}");
            }
        }
    }
}

#[test]
fn elementary_functions_agree() {
    let x: Vec<f32> = values(9, 1003).iter().map(|x| x * 20.0).collect();
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = x.iter().map(|x| mixtral_engine::math::exp(x - max)).collect();
    let up = values(10, 1003);
    let product: Vec<f32> = x.iter().zip(&up).map(|(gate, up)| mixtral_engine::math::silu(*gate) * up).collect();
    for (isa, simd) in sets() {
        assert_eq!(simd.max(&x).to_bits(), max.to_bits(), "{isa:?}");
        let mut found = x.clone();
        simd.exp(&mut found, max);
        assert_eq!(bits(&found), bits(&exp), "{isa:?}");
        let mut found = up.clone();
        simd.silu_mul(&mut found, &x);
        assert_eq!(bits(&found), bits(&product), "{isa:?}");
    }
}
