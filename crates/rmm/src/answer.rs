//! What an RMI handler returns.

use cca_abi::rmi::Status;

/// The output values X1–X4 of a successful command.
pub(crate) type Outputs = [u64; 4];

/// No outputs.
pub(crate) const NONE: Outputs = [0; 4];

/// One output, in X1.
pub(crate) const fn one(x1: u64) -> Outputs {
    [x1, 0, 0, 0]
}

/// Two outputs, in X1 and X2.
pub(crate) const fn two(x1: u64, x2: u64) -> Outputs {
    [x1, x2, 0, 0]
}

/// A failed command: its status, and the outputs that are defined although it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) status: Status,
    pub(crate) outputs: Outputs,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self { status, outputs: NONE }
    }
}

/// What every RMI handler returns.
pub(crate) type Answer = Result<Outputs, Failure>;
