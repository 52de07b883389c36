//! Loads libxenctrl's functions at run time.

use std::ffi::{c_char, c_int, c_ulong};
use std::sync::OnceLock;

use crate::Error;
use crate::bindings::{Libxenctrl, xentoollog_level, xentoollog_logger};
use crate::host::Version;

/// Loaded once and never unloaded: libxenctrl leaves thread-specific destructors behind, which
/// would run into unmapped code when a thread ends after `dlclose`.
static LIBXENCTRL: OnceLock<Libxenctrl> = OnceLock::new();

/// libxenctrl of `version`, which must have passed [`Version::check`].
pub(crate) fn libxenctrl(version: Version) -> Result<&'static Libxenctrl, Error> {
    if let Some(loaded) = LIBXENCTRL.get() {
        return Ok(loaded);
    }
    let loaded = load(version)?;
    Ok(LIBXENCTRL.get_or_init(|| loaded))
}

fn load(version: Version) -> Result<Libxenctrl, Error> {
    let library = format!("libxenctrl.so.{version}");
    // SAFETY: the name is that of Xen's own library, whose initialisers have no preconditions.
    // The function types are those of its header: the soname carries the release, and callers
    // pass only the release of the headers.
    let loaded = unsafe { Libxenctrl::new(&library) };
    loaded.map_err(|cause| Error::LibraryMissing { library, version, cause: cause.to_string() })
}

/// The logger given to libxenctrl. Without one it prints to stderr, at each failed call; here a
/// failed call returns its errno and the caller says what it means.
pub(crate) static SILENT: xentoollog_logger =
    xentoollog_logger { vmessage: Some(drop_message), progress: Some(drop_progress), destroy: Some(keep) };

/// Generic over `va_list`, which is another type on every architecture and isn't looked at.
unsafe extern "C" fn drop_message<VaList>(
    _logger: *mut xentoollog_logger,
    _level: xentoollog_level,
    _errno: c_int,
    _context: *const c_char,
    _format: *const c_char,
    _arguments: VaList,
) {
}

unsafe extern "C" fn drop_progress(
    _logger: *mut xentoollog_logger,
    _context: *const c_char,
    _what: *const c_char,
    _percent: c_int,
    _done: c_ulong,
    _total: c_ulong,
) {
}

unsafe extern "C" fn keep(_logger: *mut xentoollog_logger) {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_installed_library_has_every_function_of_its_header() {
        // libxen-dev, needed to build this crate, depends on the library.
        assert!(libxenctrl(Version::HEADERS).is_ok());
    }

    #[test]
    fn a_missing_library_names_its_package() {
        let version = Version { major: 9, minor: 99 };
        let message = load(version).err().unwrap().to_string();
        assert!(message.contains("libxenctrl.so.9.99"), "{message}");
        assert!(message.contains("libxenmisc9.99"), "{message}");
    }
}
