//! Under `cargo xtask fuzz`, this is libFuzzer's program for the reader that `FUZZ_READER` names. Otherwise it is
//! `fuzz READER FILE…`, which reads each file once, to reproduce a failure.
#![forbid(unsafe_code)]
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
mod under_libfuzzer {
    use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
    use std::sync::OnceLock;

    use fuzz::{Reader, reader};

    static READER: OnceLock<&'static Reader> = OnceLock::new();

    libfuzzer_sys::fuzz_target!(
        init: {
            let name = std::env::var("FUZZ_READER").expect("FUZZ_READER names a reader");
            READER.get_or_init(|| reader(&name).expect("a reader of the table"));
            // Removes the hook of libfuzzer-sys: it aborts at every panic, also at panics that a reader catches on
            // purpose.
            let _ = take_hook();
            set_hook(Box::new(|_| {}));
        },
        |bytes: &[u8]| {
            let Some(reader) = READER.get() else { return };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (reader.read)(bytes))) {
                let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
                eprintln!("{} panicked: {}", reader.name, text.unwrap_or("?"));
                std::process::abort();
            }
        }
    );
}

#[cfg(not(fuzzing))]
fn main() {
    let mut args = std::env::args().skip(1);
    let Some(reader) = args.next().and_then(|name| fuzz::reader(&name)) else {
        let names: Vec<_> = fuzz::READERS.iter().map(|reader| reader.name).collect();
        eprintln!("usage: fuzz READER FILE…; the readers: {}", names.join(", "));
        std::process::exit(2);
    };
    for path in args {
        match std::fs::read(&path) {
            Ok(bytes) => (reader.read)(&bytes),
            Err(error) => eprintln!("{path}: {error}"),
        }
    }
}
