//! Points on the path of a request at which a test may stop the process dead. Nothing of it is in a release.
//!
//! With the cargo feature `steps` and `VHOSTUSER_STEP=name:count` in the environment, the process kills itself when
//! it passes the point `name` for the `count`-th time, counted from 1.

/// Passes a named point, always or `if` something was done there; nothing without the feature `steps`.
macro_rules! step {
    ($name:literal) => {
        #[cfg(feature = "steps")]
        $crate::step::pass($name);
    };
    ($name:literal, if $done:expr) => {
        #[cfg(feature = "steps")]
        if $done {
            $crate::step::pass($name);
        }
    };
}

#[cfg(feature = "steps")]
mod armed {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::OnceLock;

    struct Step {
        name: String,
        left: AtomicU64,
    }

    fn step() -> Option<&'static Step> {
        static STEP: OnceLock<Option<Step>> = OnceLock::new();
        let read = || {
            let text = std::env::var("VHOSTUSER_STEP").ok()?;
            let (name, count) = text.split_once(':')?;
            Some(Step { name: name.to_owned(), left: AtomicU64::new(count.parse().ok()?) })
        };
        STEP.get_or_init(read).as_ref()
    }

    /// Kills the process when it is time.
    pub(crate) fn pass(name: &str) {
        if let Some(step) = step().filter(|step| step.name == name) {
            if step.left.fetch_sub(1, Ordering::Relaxed) == 1 {
                crate::sys::process::kill_process();
            }
        }
    }
}

#[cfg(feature = "steps")]
pub(crate) use armed::pass;
