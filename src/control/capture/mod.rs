//! Captures: what stands between the worker's copies of frames
//! ([`dataplane::capture`](crate::dataplane::capture)) and a client that wants
//! pcapng. Whoever may be a client, and how the bytes reach it, is not known here.

pub mod expression;
pub mod filter;
mod names;
mod order;
mod output;
mod pcapng;
mod session;

pub use names::Names;
pub use output::CALLS;
pub use session::{End, Options, Session, Summary};
