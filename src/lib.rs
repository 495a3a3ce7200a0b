//! vlanswitchd
pub mod frame;
pub mod switch;
