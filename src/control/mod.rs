//! What runs beside the packet path: configuration, following the devices, the
//! control socket, metrics. It may block, allocate and log; nothing here is
//! called per frame.

pub mod links;
