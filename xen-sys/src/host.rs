//! Finds out whether Xen runs on this machine, in which version, and whether that fits the headers of the build.

use std::fmt;
use std::fs;
use std::path::Path;

use crate::Error;

/// A Xen release: the unit in which Xen keeps its control ABI stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Version {
    /// The 4 of 4.17.
    pub major: u32,
    /// The 17 of 4.17.
    pub minor: u32,
}

impl Version {
    /// The release whose headers this crate was built with, and the only one it opens.
    pub const HEADERS: Self =
        Self { major: number(env!("XEN_HEADERS_MAJOR")), minor: number(env!("XEN_HEADERS_MINOR")) };

    /// From `XENVER_version`'s answer: major in the upper, minor in the lower 16 bits.
    pub(crate) const fn from_xenver(xenver: u32) -> Self {
        Self { major: xenver >> 16, minor: xenver & 0xffff }
    }

    /// Refuses every release but that of the headers.
    pub(crate) fn check(self) -> Result<Self, Error> {
        if self == Self::HEADERS {
            Ok(self)
        } else {
            Err(Error::VersionMismatch { running: self, headers: Self::HEADERS })
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Digits to a number while compiling; build.rs passes the version as text.
const fn number(text: &str) -> u32 {
    let digits = text.as_bytes();
    let mut value = 0;
    let mut at = 0;
    while at < digits.len() {
        assert!(digits[at].is_ascii_digit(), "Xen's version is no number");
        value = value * 10 + (digits[at] - b'0') as u32;
        at += 1;
    }
    value
}

/// The running hypervisor's version as the file system under `root` tells it. `None`: Xen runs,
/// but its version can't be read before the hypervisor is asked itself (a kernel without
/// `CONFIG_SYS_HYPERVISOR`, a sandbox that hides `/sys`).
pub(crate) fn running_version(root: &Path) -> Result<Option<Version>, Error> {
    let sys = root.join("sys/hypervisor");
    // KVM and others could fill /sys/hypervisor too, hence `type`.
    match fs::read_to_string(sys.join("type")) {
        Ok(kind) if kind.trim() != "xen" => return Err(Error::NoXen),
        Ok(_) => {}
        Err(_) => {
            // /proc/xen alone can be an empty mount point; its files are there only under Xen.
            let signs = ["proc/xen/capabilities", "dev/xen/privcmd"];
            if !signs.iter().any(|sign| root.join(sign).exists()) {
                return Err(Error::NoXen);
            }
        }
    }
    let major = version_file(&sys.join("version/major"))?;
    let minor = version_file(&sys.join("version/minor"))?;
    Ok(major.zip(minor).map(|(major, minor)| Version { major, minor }))
}

fn version_file(path: &Path) -> Result<Option<u32>, Error> {
    let Ok(text) = fs::read_to_string(path) else {
        return Ok(None);
    };
    match text.trim().parse() {
        Ok(value) => Ok(Some(value)),
        Err(_) => {
            Err(Error::UnreadableVersion { path: path.display().to_string(), text: text.trim().to_owned() })
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::path::PathBuf;

    use super::*;

    /// A directory in the shape of `/`, removed at the end of the test.
    struct Root(PathBuf);

    impl Root {
        fn with(files: &[(&str, &str)]) -> Self {
            let dir = std::env::temp_dir().join(format!("xen-sys-{}", uuid::Uuid::new_v4()));
            fs::create_dir(&dir).unwrap();
            for (path, text) in files {
                let file = dir.join(path);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, text).unwrap();
            }
            Self(dir)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn version_comes_from_sys_hypervisor() {
        let root = Root::with(&[
            ("sys/hypervisor/type", "xen\n"),
            ("sys/hypervisor/version/major", "4\n"),
            ("sys/hypervisor/version/minor", "17\n"),
        ]);
        let version = running_version(&root.0).unwrap();
        assert_eq!(version, Some(Version { major: 4, minor: 17 }));
    }

    #[test]
    fn no_sign_of_xen_is_no_xen() {
        let bare = Root::with(&[]);
        assert!(matches!(running_version(&bare.0), Err(Error::NoXen)));
        let empty_proc_xen = Root::with(&[("proc/xen/unrelated", "")]);
        assert!(matches!(running_version(&empty_proc_xen.0), Err(Error::NoXen)));
        let other = Root::with(&[("sys/hypervisor/type", "kvm\n")]);
        assert!(matches!(running_version(&other.0), Err(Error::NoXen)));
    }

    #[test]
    fn xen_without_version_files_is_asked_itself() {
        for sign in ["proc/xen/capabilities", "dev/xen/privcmd"] {
            let root = Root::with(&[(sign, "")]);
            assert_eq!(running_version(&root.0).unwrap(), None);
        }
    }

    #[test]
    fn a_version_that_is_no_number_is_named_with_its_file() {
        let root =
            Root::with(&[("sys/hypervisor/type", "xen\n"), ("sys/hypervisor/version/major", "four\n")]);
        let message = running_version(&root.0).unwrap_err().to_string();
        assert!(message.contains("version/major"), "{message}");
        assert!(message.contains("'four'"), "{message}");
    }

    #[test]
    fn only_the_release_of_the_headers_is_accepted() {
        assert!(Version::HEADERS.check().is_ok());
        let next = Version { minor: Version::HEADERS.minor + 1, ..Version::HEADERS };
        let message = next.check().unwrap_err().to_string();
        assert!(message.contains(&format!("Xen {next} runs here")), "{message}");
        assert!(message.contains(&format!("libxen-dev {next}")), "{message}");
    }

    #[test]
    fn xenver_packs_major_and_minor() {
        let version = Version::from_xenver(0x0004_0011);
        assert_eq!(version.to_string(), "4.17");
    }
}
