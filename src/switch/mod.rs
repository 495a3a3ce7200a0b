//! What a port is and what becomes of a frame: pure, like `frame`.
//!
//! A [`Membership`] says which VLANs a port has and how. [`Table::compile`] turns
//! all memberships into lookup tables, once per change of configuration; the two
//! `decide` functions only look up. A [`Policer`] holds a guest to its [`PoliceRule`].
//! What may not live here: devices, counters,
//! anything that waits.

mod decide;
mod membership;
mod police;
mod reason;
mod table;

pub use decide::{GuestVerdict, UplinkVerdict};
pub use membership::{Membership, MembershipError, Mode, Priority, Vlans};
pub use police::{MACS_MAX, MacAddress, PoliceRule, Policer, Rate, Storm};
pub use reason::DropReason;
pub use table::{Conflict, GuestRule, GuestRules, PortIndex, Removal, Table};
