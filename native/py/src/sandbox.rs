//! `restrict_files` and `restrict_calls`.

use std::path::{Path, PathBuf};

use pyo3::prelude::*;
use vhostuser_core::sys::sandbox;

use crate::error::Fallible;

/// What Landlock refuses from now on.
#[pyclass(frozen, get_all, module = "vhostuser._native")]
pub(crate) struct Confined {
    abi: u32,
    tcp: bool,
    scopes: bool,
}

/// Gives up files for this thread and those it makes.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // what Python hands over is ours
pub(crate) fn restrict_files(removable: Vec<PathBuf>) -> Fallible<Confined> {
    let directories: Vec<&Path> = removable.iter().map(PathBuf::as_path).collect();
    let sandbox::Confined { abi, tcp, scopes } = sandbox::files(&directories)?;
    Ok(Confined { abi, tcp, scopes })
}

/// Gives up system calls for every thread of the process.
#[pyfunction]
pub(crate) fn restrict_calls() -> Fallible<()> {
    Ok(sandbox::calls()?)
}
