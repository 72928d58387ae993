//! Errors that say which layer of the system they come from.

use std::fmt;

/// Who is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// This process: its arguments, its files, its memory.
    Vmm,
    /// The kernel module behind the KVM device.
    Module,
    /// The Realm Management Monitor, as far as the module's answer shows it.
    Rmm,
    /// What runs inside the virtual machine.
    Guest,
}

impl Layer {
    /// The layer's name as users and the lab see it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vmm => "VMM",
            Self::Module => "module",
            Self::Rmm => "RMM",
            Self::Guest => "guest",
        }
    }
}

/// A failure with its layer.
#[derive(Debug)]
pub struct Error {
    layer: Layer,
    what: String,
}

/// `Result` with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `layer`.
    pub fn new(layer: Layer, what: impl Into<String>) -> Self {
        Self { layer, what: what.into() }
    }

    /// An error of this process.
    pub fn vmm(what: impl Into<String>) -> Self {
        Self::new(Layer::Vmm, what)
    }

    /// An error of this process that an operating system call reported.
    pub fn os(what: impl fmt::Display, error: &std::io::Error) -> Self {
        Self::vmm(format!("{what}: {error}"))
    }

    /// The layer to blame.
    #[must_use]
    pub const fn layer(&self) -> Layer {
        self.layer
    }

    /// What happened, without the layer's name.
    #[must_use]
    pub fn what(&self) -> &str {
        &self.what
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.layer.name(), self.what)
    }
}

impl std::error::Error for Error {}
