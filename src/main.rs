//! vlanswitchd
fn main() {}
