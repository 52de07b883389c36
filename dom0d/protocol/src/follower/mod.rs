//! The followers of the record: the servers of a service, their legs in conversations, and the comparison of their
//! answers.

pub(crate) mod leg;
pub(crate) mod mask;
pub(crate) mod queue;
