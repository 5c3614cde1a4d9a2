//! Query, key and value linears of one weight, their RoPE and the cache write → one linear over all rows and one
//! `rope_write_kv`.

use mixtral_engine::{Buffer, Epilogue, Op, Program};

use super::{Fused, num_readers, rewrite};

/// Runs the pass.
pub fn run(program: &mut Program) {
    rewrite(program, fuse);
}

/// One of the three linears: its input, weight, rows and output.
fn projection(op: &Op) -> Option<(&str, &str, [usize; 2], &str)> {
    match op {
        Op::Linear { input, weight, rows: Some(rows), epilogue: Epilogue::Store, out, .. } => {
            Some((input, weight, *rows, out))
        }
        _ => None,
    }
}

fn fuse(program: &Program, ops: &[Op]) -> Option<Fused> {
    let [
        q,
        k,
        v,
        Op::Rope { data: rope_q, num_heads, theta },
        Op::Rope { data: rope_k, num_heads: kv_heads, theta: theta_k },
        Op::WriteKv { key, value, layer, directions },
        Op::Attention {
            query: attention_query,
            num_heads: attention_heads,
            window,
            fp8_context,
            layer: attention_layer,
            out,
        },
        ..,
    ] = ops
    else {
        return None;
    };
    let ((input, weight, q_rows, query), k, v) = (projection(q)?, projection(k)?, projection(v)?);
    let whole = program.weight(weight)?.rows();
    let consecutive = [0, q_rows[1], k.2[1], v.2[1]] == [q_rows[0], k.2[0], v.2[0], whole];
    let one_weight = [(k.0, k.1), (v.0, v.1)].iter().all(|&same| same == (input, weight));
    let wired = rope_q == query && rope_k == k.3 && key == k.3 && value == v.3 && attention_query == query;
    let alone = num_readers(program, query) == 2 && num_readers(program, key) == 2 && num_readers(program, value) == 1;
    let same_rope = theta == theta_k && *kv_heads == program.kv.num_kv_heads && num_heads == attention_heads;
    let same_rope = same_rope && directions.iter().all(|directions| directions.theta == *theta);
    if !(consecutive && one_weight && wired && alone && same_rope && layer == attention_layer) {
        return None;
    }
    // Named after the key's buffer: `layer0.key` → `layer0.qkv`.
    let qkv = format!("{}qkv", key.strip_suffix("key")?);
    let buffer = Buffer { name: qkv.clone(), cols: whole, ..program.buffer(key)?.clone() };
    let ops = vec![
        Op::Linear {
            input: input.to_owned(),
            weight: weight.to_owned(),
            rows: None,
            epilogue: Epilogue::Store,
            residual: None,
            out: qkv.clone(),
            ladder: Vec::new(),
        },
        Op::RopeWriteKv {
            qkv: qkv.clone(),
            num_heads: *num_heads,
            theta: *theta,
            layer: *layer,
            directions: directions.as_ref().map(|directions| directions.weight.clone()),
        },
        Op::Attention {
            query: qkv,
            num_heads: *num_heads,
            window: *window,
            fp8_context: *fp8_context,
            layer: *layer,
            out: out.clone(),
        },
    ];
    Some(Fused { taken: 7, ops, buffers: vec![buffer] })
}
