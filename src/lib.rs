//! vlanswitchd
pub mod control;
pub mod dataplane;
pub mod frame;
pub mod port;
pub mod switch;
pub mod sys;
