//! What becomes of a request that storage failed. Pure.

use std::time::Duration;

/// What to do with a request that storage failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Answer it with an error.
    #[default]
    Report,
    /// Submit it again, with growing pauses.
    Retry,
    /// Keep it until the operator decides.
    Hold,
}

/// The operator's wishes. They concern reads, writes, discards and zeroes, and only where a repetition means what it
/// says: never a FLUSH, never what failed while the page cache was synced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrorPolicy {
    /// For every error but those of `on_enospc`.
    pub on_error: Action,
    /// Where storage has no room left: `ENOSPC`, `EDQUOT`.
    pub on_enospc: Action,
    /// How long after its first failure a request is tried again before it is answered; `None`: for ever.
    pub retry_for: Option<Duration>,
}

/// The pause before the second attempt; each later one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(10);

impl ErrorPolicy {
    /// Whether any request may be kept.
    pub fn keeps(&self) -> bool {
        (self.on_error, self.on_enospc) != (Action::Report, Action::Report)
    }

    /// What to do about `errno`. Memory that the front-end took away does not come back.
    pub fn action(&self, errno: i32) -> Action {
        match errno {
            libc::EFAULT => Action::Report,
            libc::ENOSPC | libc::EDQUOT => self.on_enospc,
            _ => self.on_error,
        }
    }

    /// How long to wait after failure number `failures`, counted from 1.
    pub fn pause(failures: u32) -> Duration {
        let doubled = 1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
        FIRST_PAUSE.saturating_mul(doubled).min(MAX_PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_room_and_all_other_errors_have_a_policy_each() {
        let policy = ErrorPolicy { on_error: Action::Retry, on_enospc: Action::Hold, retry_for: None };
        assert_eq!(policy.action(libc::EIO), Action::Retry);
        assert_eq!(policy.action(libc::ENOSPC), Action::Hold);
        assert_eq!(policy.action(libc::EDQUOT), Action::Hold);
        assert_eq!(policy.action(libc::EFAULT), Action::Report, "the memory is gone");
        assert!(policy.keeps());
        assert!(!ErrorPolicy::default().keeps());
    }

    #[test]
    fn pauses_double_up_to_ten_seconds() {
        let pauses: Vec<u128> = (1..=9).map(|failures| ErrorPolicy::pause(failures).as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(ErrorPolicy::pause(u32::MAX), MAX_PAUSE);
    }
}
