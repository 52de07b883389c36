//! Assertions of those rules (`ARCHITECTURE.md`, "Rules") that the engine can check of itself at little cost.
//!
//! A broken rule is a fault of the engine. A debug build (tests and fuzzers) panics. A release build counts it, by
//! rule, and continues: the daemon must not end every connection for a fault in one of them. The simulator fails a run
//! in which anything was counted.

/// Checks a rule, as in `rule!(counters, broken_rule_1, condition, "the fault, if the condition does not hold")`.
macro_rules! rule {
    ($counters:expr, $counter:ident, $holds:expr, $wrong:literal) => {
        if !$holds {
            debug_assert!(false, concat!(stringify!($counter), ": ", $wrong));
            $counters.$counter += 1;
        }
    };
}

pub(crate) use rule;
