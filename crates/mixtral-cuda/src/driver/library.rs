//! Libraries that are looked for at run time, and only where they are needed.

use std::path::Path;

use libloading::Library;
use mixtral_kernels::Search;

/// A struct `Api` of a library's functions.
macro_rules! functions_of_a_library {
    ($($field:ident = $name:literal: fn($($arg:ty),*) -> $result:ty;)*) => {
        struct Api {
            $($field: unsafe extern "C" fn($($arg),*) -> $result,)*
            _library: Library,
        }

        impl Api {
            /// `None` if the library lacks one of them.
            fn of(library: Library) -> Option<Api> {
                // SAFETY: the types are those of the library's header.
                unsafe {
                    Some(Api { $($field: *library.get(concat!($name, "\0").as_bytes()).ok()?,)* _library: library })
                }
            }
        }
    };
}

/// A library of one of these `names`: on the dynamic linker's path, then wherever NVRTC may be, because CUDA's libraries are
/// installed together.
pub(super) fn find<T>(names: &[&str], search: &Search, of: impl Fn(Library) -> Option<T>) -> Option<T> {
    // SAFETY: the initializers of CUDA's libraries have no preconditions.
    let open = |path: &Path| unsafe { Library::new(path) }.ok().and_then(&of);
    let named = names.iter().find_map(|name| open(Path::new(name)));
    let in_folder = |folder: &Path| names.iter().find_map(|name| open(&folder.join(name)));
    named.or_else(|| search.folders().filter(|folder| folder.is_absolute()).find_map(|folder| in_folder(&folder)))
}
