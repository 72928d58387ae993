//! Error numbers of the ioctl ABI.

use core::fmt;

/// A Linux error number, positive. Handed to user space as `-errno`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

macro_rules! errnos {
    ($($name:ident = $value:expr),* $(,)?) => {
        #[allow(missing_docs)]
        impl Errno {
            $(pub const $name: Self = Self($value);)*

            /// The symbolic name, or `"errno"` for a number that is not in the table.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self.0 {
                    $($value => stringify!($name),)*
                    _ => "errno",
                }
            }
        }
    };
}

errnos! {
    EPERM = 1, ENOENT = 2, EINTR = 4, EIO = 5, ENXIO = 6, E2BIG = 7, ENOEXEC = 8, EBADF = 9, EAGAIN = 11,
    ENOMEM = 12, EACCES = 13, EFAULT = 14, EBUSY = 16, EEXIST = 17, ENODEV = 19, EINVAL = 22, EMFILE = 24, ENOTTY = 25,
    ENOSPC = 28, ENOSYS = 38, EOVERFLOW = 75, EOPNOTSUPP = 95, EHWPOISON = 133,
}

impl Errno {
    /// From a positive number, as a kernel service reports it. Zero and negative numbers become `EIO`.
    #[must_use]
    pub const fn from_raw(number: i32) -> Self {
        if number > 0 { Self(number) } else { Self::EIO }
    }

    /// The positive number.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// What a system call returns: the negative number.
    #[must_use]
    pub const fn to_return(self) -> i64 {
        // Widening of a 32-bit number.
        -(self.0 as i64)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name(), self.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Result of everything that user space can ask for.
pub type Result<T = i64> = core::result::Result<T, Errno>;
