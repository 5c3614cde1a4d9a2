//! Rules about the guides (`*.md`): their links resolve, the paths they name exist, and the code map stays short.

use super::{CODE_MAP, FOLDERS, MAX_CODE_MAP_LINES, Problem};

/// Checks the guide at `path`. This path, and those that `exists` takes, are relative to the root.
pub(super) fn check(path: &str, text: &str, exists: impl Fn(&str) -> bool) -> Vec<Problem> {
    let mut problems = Vec::new();
    let lines = text.lines().count();
    if path == CODE_MAP && lines >= MAX_CODE_MAP_LINES {
        let message = format!("{lines} lines, under {MAX_CODE_MAP_LINES}: it is a map, details belong beside the code");
        problems.push(Problem::new(path, None, message));
    }
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let (mut fenced, mut in_span) = (false, false);
    for (i, line) in text.lines().enumerate() {
        let fence = line.trim_start().starts_with("```") || line.trim_start().starts_with("~~~");
        fenced ^= fence;
        if fenced || fence {
            continue;
        }
        in_span &= !line.trim().is_empty();
        let (prose, spans) = split_spans(line, &mut in_span);
        for target in links(&prose).into_iter().filter(|target| is_relative(target)) {
            let file = target.split('#').next().unwrap_or_default();
            if !file.is_empty() && !exists(&join(folder, file)) {
                problems.push(Problem::new(path, i + 1, format!("the link to `{target}` leads nowhere")));
            }
        }
        for named in spans.into_iter().filter(|span| is_path(span)) {
            if !exists(named) && !exists(&join(folder, named)) {
                problems.push(Problem::new(path, i + 1, format!("`{named}` does not exist")));
            }
        }
    }
    problems
}

/// A line's text with its code spans emptied, and the spans. `in_span` says whether the line starts inside of a span;
/// afterwards it says whether the line ends inside of one.
fn split_spans<'a>(line: &'a str, in_span: &mut bool) -> (String, Vec<&'a str>) {
    let (mut prose, mut spans) = (String::new(), Vec::new());
    for (i, part) in line.split('`').enumerate() {
        *in_span ^= i > 0;
        if *in_span {
            spans.push(part);
            prose.push_str("``");
        } else {
            prose.push_str(part);
        }
    }
    (prose, spans)
}

/// The targets of links: `[text](target)`, and `[text]: target` at the start of a line.
fn links(prose: &str) -> Vec<&str> {
    let mut targets: Vec<&str> = prose.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next()).collect();
    if prose.starts_with('[')
        && let Some((_, target)) = prose.split_once("]: ")
    {
        targets.extend(target.split_whitespace().next());
    }
    targets
}

fn is_relative(target: &str) -> bool {
    !target.contains("://") && !target.starts_with("mailto:")
}

/// Whether a code span is a path in the workspace: it starts with one of the workspace's folders and has no placeholder
/// in it.
fn is_path(span: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    span.split_once('/').is_some_and(|(first, _)| FOLDERS.contains(&first)) && span.chars().all(plain)
}

/// The path `relative` to `folder`, without `.` and `..`.
fn join(folder: &str, relative: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in relative.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    if parts.is_empty() { ".".to_owned() } else { parts.join("/") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        let files = [".", "README.md", "docs/a.md", "examples/tiny", "crates/mixtral-cpu/src"];
        let exists = |path: &str| files.contains(&path.trim_end_matches('/'));
        check(path, text, exists).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn links_that_resolve_are_no_problem() {
        let text = "[a](docs/a.md#part), [b](https://example.org/x) ![c](examples/tiny) [d](#here) [e](mailto:a@b.c)\n\
                    [f]: docs/a.md\n`[g](nowhere.md)`\n```\n[h](nowhere.md)\n```\n[i](./docs/../README.md \"title\")\n";
        assert_eq!(found("README.md", text), [""; 0]);
        assert_eq!(found("docs/a.md", "[a](../README.md) [b](a.md) [c](..)"), [""; 0]);
        assert_eq!(found("README.md", "`a span [a](gone.md)\nends` here\n"), [""; 0]);
    }

    #[test]
    fn links_that_lead_nowhere_are_found() {
        let text = "fine\n[a](docs/b.md) and [b](docs/a.md)\n[c]: gone.md\n";
        let expected =
            ["README.md:2: the link to `docs/b.md` leads nowhere", "README.md:3: the link to `gone.md` leads nowhere"];
        assert_eq!(found("README.md", text), expected);
        assert_eq!(found("docs/a.md", "[a](docs/a.md)"), ["docs/a.md:1: the link to `docs/a.md` leads nowhere"]);
        assert_eq!(found("README.md", "`a\nb` [c](gone.md)\n").len(), 1);
        assert_eq!(found("README.md", "a ` alone\n\n[c](gone.md)\n").len(), 1);
        assert_eq!(found("README.md", "[a](../README.md)"), ["README.md:1: the link to `../README.md` leads nowhere"]);
    }

    #[test]
    fn paths_that_do_not_exist_are_found() {
        let text = "`crates/mixtral-cpu/src/` `crates/<name>` `a/b` `examples/tiny --flag` `tests/gone.rs`\n";
        assert_eq!(found("README.md", text), ["README.md:1: `tests/gone.rs` does not exist"]);
    }

    #[test]
    fn a_long_code_map_is_found() {
        let long = "\n".repeat(MAX_CODE_MAP_LINES);
        assert_eq!(found("README.md", &long), [""; 0]);
        assert_eq!(found(CODE_MAP, &long[1..]), [""; 0]);
        let expected = "ARCHITECTURE.md: 300 lines, under 300: it is a map, details belong beside the code";
        assert_eq!(found(CODE_MAP, &long), [expected]);
    }
}
