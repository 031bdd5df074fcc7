//! What threads meet on, where the order of events decides: the standard library's own. In `native/loom` it is loom's
//! instead, so that every order that the memory model allows is tried on the same code.

#[cfg(not(loom))]
pub use std::sync::{
    atomic::{fence, AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering},
    Mutex,
};

#[cfg(not(loom))]
pub use super::eventfd::EventFd;

#[cfg(loom)]
pub use modelled::{fence, AtomicU16, AtomicU32, AtomicU64, AtomicU8, EventFd};

#[cfg(loom)]
pub use loom::sync::{
    atomic::{AtomicBool, Ordering},
    Mutex,
};

/// What loom does not have: atomics in memory that somebody else has mapped, and eventfds.
#[cfg(loom)]
#[allow(missing_docs)]
pub mod modelled {
    use std::cell::{Cell, RefCell};
    use std::collections::HashMap;
    use std::os::fd::{AsRawFd, RawFd};
    use std::panic::Location;
    use std::rc::Rc;

    use loom::sync::atomic::Ordering;
    use loom::sync::{Condvar, Mutex};

    // loom runs all threads of a model on one thread of the system.
    thread_local! {
        static WITHOUT_FENCES: Cell<Option<&'static str>> = const { Cell::new(None) };
    }

    /// Every order of what `test` does. `without_fences` names a source file whose fences are left out: a planted mistake.
    pub fn every_order(without_fences: Option<&'static str>, test: impl Fn() + Send + Sync + 'static) {
        WITHOUT_FENCES.set(without_fences);
        let mut model = loom::model::Builder::new();
        model.preemption_bound = None;
        model.check(move || {
            forget();
            test();
            forget();
        });
    }

    #[track_caller]
    pub fn fence(order: Ordering) {
        let here = Location::caller().file();
        if !WITHOUT_FENCES.get().is_some_and(|file| here.ends_with(file)) {
            loom::sync::atomic::fence(order);
        }
    }

    macro_rules! shared {
        ($($name:ident $cells:ident $number:ty;)*) => {
            $(
                thread_local! {
                    static $cells: RefCell<HashMap<usize, Rc<loom::sync::atomic::$name>>> = RefCell::default();
                }

                /// A number in mapped memory. What it is worth is loom's to say, from the first access on.
                #[repr(transparent)]
                pub struct $name(std::sync::atomic::$name);

                impl $name {
                    fn cell(&self) -> Rc<loom::sync::atomic::$name> {
                        let first = self.0.load(std::sync::atomic::Ordering::Relaxed);
                        let fresh = || Rc::new(loom::sync::atomic::$name::new(first));
                        $cells.with_borrow_mut(|cells| {
                            Rc::clone(cells.entry(std::ptr::from_ref(self) as usize).or_insert_with(fresh))
                        })
                    }

                    pub fn load(&self, order: Ordering) -> $number {
                        self.cell().load(order)
                    }

                    pub fn store(&self, value: $number, order: Ordering) {
                        self.cell().store(value, order);
                    }

                    #[allow(dead_code)] // not of every width
                    pub fn swap(&self, value: $number, order: Ordering) -> $number {
                        self.cell().swap(value, order)
                    }

                    #[allow(dead_code)]
                    pub fn fetch_or(&self, bits: $number, order: Ordering) -> $number {
                        self.cell().fetch_or(bits, order)
                    }
                }
            )*

            /// Every number in mapped memory is what lies there again.
            fn forget() {
                $($cells.with_borrow_mut(HashMap::clear);)*
            }
        };
    }

    shared! {
        AtomicU8 CELLS8 u8;
        AtomicU16 CELLS16 u16;
        AtomicU32 CELLS32 u32;
        AtomicU64 CELLS64 u64;
    }

    /// An eventfd without its descriptor.
    #[derive(Debug)]
    pub struct EventFd {
        signalled: Mutex<bool>,
        changed: Condvar,
    }

    impl EventFd {
        pub fn new() -> std::io::Result<Self> {
            Ok(Self { signalled: Mutex::new(false), changed: Condvar::new() })
        }

        pub fn signal(&self) {
            *self.signalled.lock().unwrap() = true;
            self.changed.notify_one();
        }

        pub fn drain(&self) -> bool {
            std::mem::take(&mut *self.signalled.lock().unwrap())
        }

        /// What the kernel does for who polls it.
        pub fn wait(&self) {
            let mut signalled = self.signalled.lock().unwrap();
            while !*signalled {
                signalled = self.changed.wait(signalled).unwrap();
            }
        }
    }

    impl AsRawFd for EventFd {
        fn as_raw_fd(&self) -> RawFd {
            -1
        }
    }
}
