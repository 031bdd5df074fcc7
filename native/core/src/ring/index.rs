//! Free-running 16-bit indices. Pure.

/// Whether moving from `old` to `new` passes `event`, so that the other side must be notified
/// (virtio: Used Buffer Notification Suppression).
#[inline]
pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// How far `to` is ahead of `from`.
#[inline]
pub const fn ahead(to: u16, from: u16) -> u16 {
    to.wrapping_sub(from)
}

/// The slot of a free-running index in a ring whose size is a power of two.
#[inline]
pub const fn slot(index: u16, size: u16) -> u16 {
    index & (size - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_event_is_passed_exactly_when_it_lies_between() {
        for (event, new, old, passed) in
            [(0, 1, 0, true), (7, 8, 5, true), (8, 8, 5, false), (4, 8, 5, false), (65535, 1, 65535, true)]
        {
            assert_eq!(need_event(event, new, old), passed, "event {event}, {old} to {new}");
        }
    }

    #[test]
    fn every_event_agrees_with_walking_the_indices() {
        for old in [0u16, 1, 40000, 65530] {
            for steps in 0..70u16 {
                let new = old.wrapping_add(steps);
                for event in (0..=65535u16).step_by(7).chain(old.wrapping_sub(3)..=old.saturating_add(75)) {
                    let walked = (0..steps).any(|step| old.wrapping_add(step) == event);
                    assert_eq!(need_event(event, new, old), walked, "event {event}, {old} to {new}");
                }
            }
        }
    }
}
