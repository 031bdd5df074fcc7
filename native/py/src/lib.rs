//! The Python shell over `vhostuser-core`: converts arguments and errors, lets other Python threads run
//! while a call waits, decides nothing. `src/vhostuser/_native.pyi` is its contract.
#![deny(unsafe_code)]

mod arena;
mod chains;
mod client;
mod device;
mod dirty;
mod driver;
mod engine;
mod error;
mod inflight;
mod memory;
mod queues;
mod sandbox;

use pyo3::prelude::*;

/// The native half of `vhostuser`.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<memory::GuestMemory>()?;
    module.add_class::<dirty::DirtyLog>()?;
    module.add_class::<inflight::InflightRegion>()?;
    module.add_class::<engine::EngineSpec>()?;
    module.add_class::<queues::Event>()?;
    module.add_class::<queues::InFlight>()?;
    module.add_class::<queues::Queues>()?;
    module.add_class::<queues::BlockQueues>()?;
    module.add_class::<chains::ChainQueues>()?;
    module.add_class::<chains::Chain>()?;
    module.add_class::<arena::Arena>()?;
    module.add_class::<driver::DriverRing>()?;
    module.add_class::<device::DeviceRing>()?;
    module.add_class::<client::RequestQueue>()?;
    module.add_class::<client::StopFlag>()?;
    module.add_class::<client::LoadResult>()?;
    module.add_function(wrap_pyfunction!(client::run_load, module)?)?;
    module.add_class::<sandbox::Confined>()?;
    module.add_function(wrap_pyfunction!(sandbox::restrict_files, module)?)?;
    module.add_function(wrap_pyfunction!(sandbox::restrict_calls, module)?)?;
    Ok(())
}
