//! Rules about source files: length, unsafe code, names that only some crates know, unfinished code.

use super::lexer::{Code, has_word};
use super::{BANNED, HUGGING_FACE, KNOWS_HUGGING_FACE, MAX_FILE_LINES, NOT_IN_LIB, Problem, UNSAFE};

/// Checks the source file at `path`, relative to the workspace's root.
pub(super) fn check(path: &str, text: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    let lines = text.lines().count();
    if lines > MAX_FILE_LINES {
        let message = format!("{lines} lines, at most {MAX_FILE_LINES}: one noun a file");
        problems.push(Problem::new(path, None, message));
    }
    if path.ends_with(".rs") {
        let code = Code::of(text);
        problems.extend(unsafe_code(path, &code.bare));
        problems.extend(hugging_face_names(path, &code));
        problems.extend(banned(path, &code.bare));
        if path.ends_with("/src/lib.rs") {
            problems.extend(logic_in_lib(path, &code.bare));
        }
    }
    problems
}

/// Checks that unsafe code is only in the files that may contain it, and that each crate's root makes the compiler
/// check this.
fn unsafe_code(path: &str, bare: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    if !UNSAFE.iter().any(|allowed| path.starts_with(allowed)) {
        for (line, _) in numbered(bare).filter(|(_, text)| has_word(text, "unsafe")) {
            let message = format!("unsafe code outside of {}", UNSAFE.join(", "));
            problems.push(Problem::new(path, line, message));
        }
    }
    if let Some(source) = path.strip_suffix("lib.rs").or(path.strip_suffix("main.rs"))
        && source.ends_with("/src/")
    {
        let may = UNSAFE.iter().any(|allowed| allowed.starts_with(source));
        let wanted = if may { "#![deny(unsafe_code)]" } else { "#![forbid(unsafe_code)]" };
        if !bare.contains(wanted) {
            problems.push(Problem::new(path, None, format!("no `{wanted}`")));
        }
    }
    problems
}

/// Checks that Hugging Face's names appear only in the crates that translate them.
fn hugging_face_names(path: &str, code: &Code) -> Vec<Problem> {
    let is_test = path.ends_with("/tests.rs") || path.split('/').any(|part| part == "tests" || part == "benches");
    if !path.starts_with("crates/") || is_test || KNOWS_HUGGING_FACE.iter().any(|known| path.starts_with(known)) {
        return Vec::new();
    }
    let code = code.without_tests();
    let found = numbered(&code)
        .flat_map(|(line, text)| HUGGING_FACE.iter().filter(move |n| text.contains(**n)).map(move |n| (line, n)));
    found.map(|(line, name)| Problem::new(path, line, format!("`{name}` is for mixtral-convert alone"))).collect()
}

fn banned(path: &str, bare: &str) -> Vec<Problem> {
    let found = numbered(bare)
        .flat_map(|(line, text)| BANNED.iter().filter(move |b| text.contains(b.0)).map(move |b| (line, b)));
    found.map(|(line, (what, instead))| Problem::new(path, line, format!("`{what}`: {instead}"))).collect()
}

fn logic_in_lib(path: &str, bare: &str) -> Vec<Problem> {
    let found = numbered(bare).filter(|(_, text)| NOT_IN_LIB.iter().any(|word| has_word(text, word)));
    found.map(|(line, _)| Problem::new(path, line, "lib.rs is documentation, modules and re-exports")).collect()
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        check(path, text).iter().map(ToString::to_string).collect()
    }

    const LIB: &str = "//! A crate with one fn in it, unsafe or not.\n#![forbid(unsafe_code)]\n\npub mod a;\n";

    #[test]
    fn a_file_within_the_rules_has_no_problem() {
        assert_eq!(check("crates/mixtral-model/src/lib.rs", LIB), []);
        assert_eq!(
            check("crates/mixtral-model/src/a.rs", "/// Not a todo!().\nfn f() -> &'static str { \"dbg!\" }\n"),
            []
        );
    }

    #[test]
    fn long_files_are_found() {
        let long = "\n".repeat(MAX_FILE_LINES + 1);
        assert_eq!(check("kernels/gemm.cuh", &long[1..]), []);
        assert_eq!(found("kernels/gemm.cuh", &long), ["kernels/gemm.cuh: 801 lines, at most 800: one noun a file"]);
    }

    #[test]
    fn unsafe_code_is_found_where_it_may_not_be() {
        let text = "fn f() {}\nunsafe fn g() {}\n";
        for allowed in ["crates/mixtral-checkpoint/src/map.rs", "crates/mixtral-cpu/src/simd/tiles.rs"] {
            assert_eq!(check(allowed, text), []);
        }
        for other in
            ["crates/mixtral-cpu/src/backend.rs", "crates/mixtral-checkpoint/src/header.rs", "tests/src/run.rs"]
        {
            assert_eq!(check(other, text)[0].line, Some(2));
        }
    }

    #[test]
    fn every_crate_root_forbids_or_denies_unsafe_code() {
        let denied = LIB.replace("forbid", "deny");
        assert_eq!(check("crates/mixtral-checkpoint/src/lib.rs", &denied), []);
        let path = "crates/mixtral-model/src/lib.rs";
        assert_eq!(found(path, &denied), [format!("{path}: no `#![forbid(unsafe_code)]`")]);
        assert_eq!(
            found("crates/mixtral/src/main.rs", ""),
            ["crates/mixtral/src/main.rs: no `#![forbid(unsafe_code)]`"]
        );
        let path = "crates/mixtral-cpu/src/lib.rs";
        assert_eq!(found(path, "// #![deny(unsafe_code)]\n"), [format!("{path}: no `#![deny(unsafe_code)]`")]);
    }

    #[test]
    fn foreign_names_are_found_outside_of_convert() {
        for name in HUGGING_FACE {
            let code = format!("\nconst NAME: &str = \"{name}0\";\n");
            assert_eq!(
                found("crates/mixtral-build/src/graph.rs", &code),
                [format!("crates/mixtral-build/src/graph.rs:2: `{name}` is for mixtral-convert alone")]
            );
            assert_eq!(check("crates/mixtral-convert/src/names.rs", &code), []);
            assert_eq!(check("crates/mixtral/tests/cli.rs", &code), []);
            assert_eq!(
                check("crates/mixtral-engine/src/dummy.rs", &format!("#[cfg(test)]\nmod tests {{{code}}}\n")),
                []
            );
            assert_eq!(check("crates/mixtral-engine/src/dummy.rs", &format!("/// `{name}`\nfn f() {{}}\n")), []);
        }
    }

    #[test]
    fn unfinished_code_is_found() {
        for (what, instead) in BANNED {
            let text = format!("fn f() {{\n    {what}\n}}\n");
            assert_eq!(found("xtask/src/main/x.rs", &text), [format!("xtask/src/main/x.rs:2: `{what}`: {instead}")]);
        }
    }

    #[test]
    fn logic_in_lib_is_found() {
        for logic in ["pub fn f() {}", "impl A {}", "macro_rules! m { () => {} }"] {
            let path = "crates/mixtral-model/src/lib.rs";
            let expected = format!("{path}:5: lib.rs is documentation, modules and re-exports");
            assert_eq!(found(path, &format!("{LIB}{logic}\n")), [expected]);
        }
    }
}
