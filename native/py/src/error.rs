//! Rust errors as the classes of `vhostuser.errors`.

use pyo3::exceptions::PyBlockingIOError;
use pyo3::PyErr;
use vhostuser_core::memory::inflight::InflightError;
use vhostuser_core::memory::{MemoryError, Unmapped};
use vhostuser_core::ring::{Broken, DriverError, SetupError as RingSetupError};
use vhostuser_core::worker::QueueError;

pyo3::import_exception!(vhostuser.errors, DrainTimeout);
pyo3::import_exception!(vhostuser.errors, GuestMemoryError);
pyo3::import_exception!(vhostuser.errors, PeerGone);
pyo3::import_exception!(vhostuser.errors, RemoteRingError);
pyo3::import_exception!(vhostuser.errors, SetupError);
pyo3::import_exception!(vhostuser.errors, VhostUserError);

/// Any error of the core.
pub(crate) enum Failure {
    Io(std::io::Error),
    Memory(String),
    Queue(QueueError),
    Driver(DriverError),
    Broken(Broken),
    Setup(String),
    Silent(String),
}

/// What every fallible method of this crate returns.
pub(crate) type Fallible<T> = Result<T, Failure>;

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Io(error) => error.into(),
            Failure::Memory(why) => GuestMemoryError::new_err(why),
            Failure::Silent(why) => PeerGone::new_err(why),
            Failure::Setup(why) => SetupError::new_err(why),
            Failure::Queue(error @ QueueError::Setup(_)) => SetupError::new_err(error.to_string()),
            Failure::Queue(error @ QueueError::DrainTimeout) => DrainTimeout::new_err(error.to_string()),
            Failure::Queue(error @ QueueError::WorkerGone) => VhostUserError::new_err(error.to_string()),
            Failure::Driver(error @ DriverError::Full) => PyBlockingIOError::new_err(error.to_string()),
            Failure::Driver(error @ (DriverError::Chain | DriverError::Memory)) => {
                SetupError::new_err(error.to_string())
            }
            Failure::Driver(error) => RemoteRingError::new_err(error.to_string()),
            Failure::Broken(broken) => RemoteRingError::new_err(broken.to_string()),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error.to_string())
    }
}

impl From<InflightError> for Failure {
    fn from(error: InflightError) -> Self {
        match error {
            InflightError::Shape(_) => Self::Setup(error.to_string()),
            InflightError::Io(_) => Self::Memory(error.to_string()),
        }
    }
}

impl From<Unmapped> for Failure {
    fn from(_: Unmapped) -> Self {
        Self::Memory("the address range is not wholly in guest memory".into())
    }
}

impl From<QueueError> for Failure {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

impl From<Broken> for Failure {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

impl From<RingSetupError> for Failure {
    fn from(error: RingSetupError) -> Self {
        Self::Setup(error.to_string())
    }
}
