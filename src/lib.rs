//! vlanswitchd
pub mod frame;
