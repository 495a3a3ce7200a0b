//! What runs beside the packet path: configuration, following the devices, the
//! daemon itself. It may block, allocate and log; nothing here is called per frame.

pub mod accounts;
mod affinity;
pub mod api;
mod balance;
pub mod capture;
mod checks;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod fallback;
mod host;
pub mod links;
pub mod mapping;
pub mod metrics;
mod mtu;
mod parallel;
mod placement;
pub mod privileges;
mod probe;
mod record;
pub mod report;
pub mod server;
pub mod start_error;
mod store;
mod takeover;
mod unsent;
