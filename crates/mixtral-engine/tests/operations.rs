//! What each operation requires of its operands. Each program has one operation, so that no other operation's check
//! hides a missing one.

use mixtral_engine::Program;
use mixtral_model::ElemType;

/// A program of six query heads over three of 4 elements, 2 of 5 experts a token, and 20 tokens in the vocabulary; rank
/// 1 of 4.
const HEAD: &str = "mixtral-program 1
program rank=1 world_size=4 tp_size=2 dtype=bfloat16 vocab_size=20 num_layers=3 num_experts=5 top_k=2 arena_bytes=65536
limits max_batch_size=2 max_num_tokens=8 max_seq_len=16 max_num_logits=4 block_size=4
kv num_layers=2 num_kv_heads=3 head_dim=4 dtype=bfloat16
";

/// Operations, and operands that they accept: buffers by type, rows and columns, weights by shape.
const OPERATIONS: &[(&str, &[&str])] = &[
    ("embed table=w vocab_start=0 out=x", &["w [20,12]", "x bf16 tokens 12"]),
    ("norm input=x weight=w eps=1e-5 out=y", &["x bf16 tokens 12", "w [12]", "y bf16 tokens 12"]),
    ("add a=a b=b out=c", &["a bf16 tokens 12", "b bf16 tokens 12", "c bf16 tokens 12"]),
    ("linear input=x weight=w epilogue=store out=y", &["x bf16 tokens 12", "w [7,12]", "y bf16 tokens 7"]),
    ("linear input=x weight=w rows=[2,6] epilogue=store out=y", &["x bf16 tokens 12", "w [7,12]", "y bf16 tokens 4"]),
    ("linear input=x weight=w epilogue=f32 out=y", &["x bf16 logits 12", "w [7,12]", "y f32 logits 7"]),
    (
        "linear input=x weight=w epilogue=residual residual=r out=y",
        &["x bf16 tokens 12", "w [7,12]", "r bf16 tokens 7", "y bf16 tokens 7"],
    ),
    ("rope data=q num_heads=6 theta=1000000.0", &["q bf16 tokens 24"]),
    ("write_kv key=k value=v layer=1", &["k bf16 tokens 12", "v bf16 tokens 12"]),
    ("rope_write_kv qkv=q num_heads=6 theta=1000000.0 layer=1", &["q bf16 tokens 48"]),
    ("attention query=q num_heads=6 layer=1 out=x", &["q bf16 tokens 24", "x bf16 tokens 24"]),
    ("softmax logits=l probs=p", &["l f32 tokens 5", "p f32 tokens 5"]),
    (
        "top_k probs=p normalization=renorm layer=2 expert_ids=i expert_weights=e",
        &["p f32 tokens 5", "i i32 tokens 2", "e f32 tokens 2"],
    ),
    (
        "expert_sort expert_ids=i experts=[1,4] offsets=s order=o",
        &["i i32 tokens 2", "s i32 one 4", "o i32 assignments 1"],
    ),
    (
        "route logits=l normalization=renorm layer=2 experts=[1,4] expert_ids=i expert_weights=e offsets=s order=o",
        &["l f32 tokens 5", "i i32 tokens 2", "e f32 tokens 2", "s i32 one 4", "o i32 assignments 1"],
    ),
    (
        "expert_gate_up input=x weight=w offsets=s order=o silu_mul=true out=y",
        &["x bf16 tokens 12", "w [3,14,12]", "s i32 one 4", "o i32 assignments 1", "y bf16 assignments 7"],
    ),
    (
        "expert_gate_up input=x weight=w offsets=s order=o silu_mul=false out=y",
        &["x bf16 tokens 12", "w [3,14,12]", "s i32 one 4", "o i32 assignments 1", "y bf16 assignments 14"],
    ),
    ("silu_mul input=x out=y", &["x bf16 assignments 14", "y bf16 assignments 7"]),
    (
        "expert_down input=x weight=w offsets=s order=o out=y",
        &["x bf16 assignments 7", "w [3,12,7]", "s i32 one 4", "o i32 assignments 1", "y bf16 assignments 12"],
    ),
    (
        "combine input=x expert_ids=i expert_weights=e experts=[1,4] residual=r out=y norm={\"weight\":\"w\",\"eps\":1e-5,\"out\":\"z\"}",
        &[
            "x bf16 assignments 12",
            "i i32 tokens 2",
            "e f32 tokens 2",
            "r bf16 tokens 12",
            "y bf16 tokens 12",
            "w [12]",
            "z bf16 tokens 12",
        ],
    ),
    (
        "all_reduce input=x residual=r out=y norm={\"weight\":\"w\",\"eps\":1e-5,\"out\":\"z\"}",
        &["x bf16 tokens 12", "r bf16 tokens 12", "y bf16 tokens 12", "w [12]", "z bf16 tokens 12"],
    ),
    ("all_gather input=x out=y", &["x bf16 tokens 6", "y bf16 tokens 12"]),
    ("send input=x to=3", &["x bf16 tokens 12"]),
    ("recv out=x from=0", &["x bf16 tokens 12"]),
    ("gather_rows input=x out=y", &["x bf16 tokens 12", "y bf16 logits 12"]),
    ("sample logits=l", &["l f32 logits 20"]),
];

/// Checks a program of one operation.
fn check(op: &str, operands: &[String]) -> Result<(), String> {
    let mut text = HEAD.to_owned();
    for (place, operand) in operands.iter().enumerate() {
        text += &match operand.split(' ').collect::<Vec<_>>()[..] {
            [name, shape] => format!("weight name={name} dtype=bfloat16 shape={shape} format=plain\n"),
            [name, dtype, rows, cols] => {
                format!("buffer name={name} dtype={dtype} rows={rows} cols={cols} offset={}\n", place * 4096)
            }
            _ => panic!("{operand} is no operand"),
        };
    }
    Program::parse(&format!("{text}op {op}\n")).map(drop).map_err(|error| error.to_string())
}

fn owned(operands: &[&str]) -> Vec<String> {
    operands.iter().map(|operand| (*operand).to_owned()).collect()
}

/// An operand with one thing changed.
fn changes(operand: &str) -> Vec<String> {
    let words: Vec<&str> = operand.split(' ').collect();
    let [name, dtype, rows, cols] = words[..] else {
        let (name, shape) = operand.split_once(" [").unwrap();
        let sides: Vec<usize> = shape.trim_end_matches(']').split(',').map(|side| side.parse().unwrap()).collect();
        let mut shapes = vec![[&sides[..], &[1]].concat(), [&sides[..], &[2]].concat()];
        for side in 0..sides.len() {
            for length in [sides[side] - 1, sides[side] + 1] {
                let mut changed = sides.clone();
                changed[side] = length;
                shapes.push(changed);
            }
        }
        return shapes.iter().map(|shape| format!("{name} {shape:?}").replace(", ", ",")).collect();
    };
    let others =
        |of: [&'static str; 4], but: &str| of.into_iter().filter(move |other| *other != but).collect::<Vec<_>>();
    let cols: usize = cols.parse().unwrap();
    let mut all = vec![format!("{name} {dtype} {rows} {}", cols + 1), format!("{name} {dtype} {rows} {}", cols - 1)];
    all.extend(
        others(["f32", "f16", "bf16", "i32"], dtype).iter().map(|dtype| format!("{name} {dtype} {rows} {cols}")),
    );
    all.extend(
        others(["tokens", "assignments", "logits", "one"], rows)
            .iter()
            .map(|rows| format!("{name} {dtype} {rows} {cols}")),
    );
    all
}

/// Nearly every change of a single operand is refused. The snapshot lists those that are not.
#[test]
fn operands_have_the_type_rows_and_columns_that_the_operation_needs() {
    let mut taken = String::new();
    for (op, operands) in OPERATIONS {
        let operands = owned(operands);
        assert_eq!(check(op, &operands), Ok(()), "{op}");
        taken += &format!("{op}\n");
        for (place, operand) in operands.iter().enumerate() {
            for change in changes(operand) {
                let mut changed = operands.clone();
                changed[place].clone_from(&change);
                if check(op, &changed).is_ok() {
                    taken += &format!("  {operand}: also {change}\n");
                }
            }
            let without = [&operands[..place], &operands[place + 1..]].concat();
            assert!(check(op, &without).is_err(), "{op}: without {operand}");
        }
    }
    insta::assert_snapshot!(taken);
}

/// The operands of the operation of that name, the first of them if there are several.
fn operands(op: &str) -> Vec<String> {
    let name = op.split(' ').next().unwrap();
    owned(OPERATIONS.iter().find(|(other, _)| other.split(' ').next() == Some(name)).unwrap().1)
}

#[test]
fn arguments_are_within_the_model_and_the_job() {
    let said: Vec<String> = [
        "rope data=q num_heads=7 theta=1000000.0",
        "rope_write_kv qkv=q num_heads=6 theta=1000000.0 layer=2",
        "write_kv key=k value=v layer=2",
        "attention query=q num_heads=6 layer=2 out=x",
        "attention query=q num_heads=6 window=0 layer=1 out=x",
        "top_k probs=p normalization=renorm layer=3 expert_ids=i expert_weights=e",
        "route logits=l normalization=renorm layer=3 experts=[1,4] expert_ids=i expert_weights=e offsets=s order=o",
        "expert_sort expert_ids=i experts=[3,6] offsets=s order=o",
        "expert_sort expert_ids=i experts=[4,1] offsets=s order=o",
        "combine input=x expert_ids=i expert_weights=e experts=[1,6] out=y",
        "linear input=x weight=w rows=[1,8] epilogue=store out=y",
        "linear input=x weight=w rows=[3,3] epilogue=store out=y",
        "linear input=x weight=w epilogue=residual out=y",
        "linear input=x weight=w epilogue=store residual=y out=y",
        "send input=x to=1",
        "send input=x to=4",
        "recv out=x from=1",
        "recv out=x from=4",
    ]
    .iter()
    .map(|op| check(op, &operands(op)).expect_err(op))
    .collect();
    insta::assert_snapshot!(said.join("\n"));
    // Heads that do not group over those of the cache, in buffers of their width.
    let attention = |heads: usize| {
        let buffers = ["q", "x"].map(|name| format!("{name} bf16 tokens {}", heads * 4));
        check(&format!("attention query=q num_heads={heads} layer=1 out=x"), &buffers)
    };
    assert_eq!((attention(3), attention(9)), (Ok(()), Ok(())));
    assert!([1, 2, 4, 7].iter().all(|&heads| attention(heads).unwrap_err().contains("do not group over 3 KV heads")));
    let rope = |heads: usize| {
        check(
            &format!("rope_write_kv qkv=q num_heads={heads} theta=1000000.0 layer=1"),
            &[format!("q bf16 tokens {}", heads * 4 + 24)],
        )
    };
    assert_eq!((rope(3), rope(0).is_err(), rope(4).is_err()), (Ok(()), true, true));
}

/// A program's lines: blank ones and comments are skipped, and a message names the line that it is about.
#[test]
fn lines_that_cannot_be_read_are_named() {
    let spaced = HEAD.replace('\n', "\n\n  \n# A comment.\n");
    assert_eq!(Program::parse(&spaced).unwrap(), Program::parse(HEAD).unwrap());
    let piece = "piece source=a source_rows=1 source_cols=1 rows={\"start\":0,\"end\":1} cols={\"start\":0,\"end\":1} target_row=0\n";
    let texts = [
        String::new(),
        HEAD.replace("mixtral-program", "program"),
        HEAD.replace("mixtral-program 1", "mixtral-program 2"),
        HEAD.replace("\nprogram", "\nsomething"),
        HEAD.replace("\nlimits", "\n#"),
        HEAD.replace("\nkv", "\n#"),
        HEAD.replace("\nprogram", "\n#"),
        format!("{HEAD}buffer\n"),
        format!("{HEAD}weight\n"),
        format!("{HEAD}{piece}"),
        format!("{HEAD}op fly\n"),
    ];
    let said = texts.map(|text| Program::parse(&text).expect_err("no program").to_string());
    insta::assert_snapshot!(said.join("\n"));
}

/// Types have the same names in messages as in a program's text.
#[test]
fn types_are_named_alike() {
    for dtype in [ElemType::F32, ElemType::F16, ElemType::Bf16, ElemType::I32] {
        assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.to_string());
    }
}
