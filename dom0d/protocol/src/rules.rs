//! Assertions of the rules (`ARCHITECTURE.md`, "Rules") that the engine can check of itself at little cost.
//!
//! A rule that is broken is a fault of the engine's. A debug build panics: tests and fuzzers. A release build goes on and counts
//! it, by rule: the daemon must not take everybody's connections down for a fault in one, and the simulator fails a run in
//! which anything was counted.

/// Checks a rule, as in `rule!(counters, broken_rule_1, condition, "what is wrong if it does not hold")`.
macro_rules! rule {
    ($counters:expr, $counter:ident, $holds:expr, $wrong:literal) => {
        if !$holds {
            debug_assert!(false, concat!(stringify!($counter), ": ", $wrong));
            $counters.$counter += 1;
        }
    };
}

pub(crate) use rule;
