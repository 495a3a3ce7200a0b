//! What interfaces are called in a capture: a table control extends while captures
//! run.

use crate::switch::PortIndex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// The names of the uplink (`None`) and the ports. Clones are the same table.
#[derive(Debug, Clone, Default)]
pub struct Names(Arc<Table>);

#[derive(Debug, Default)]
struct Table {
    names: RwLock<HashMap<Option<PortIndex>, Arc<str>>>,
    version: AtomicU64,
}

impl Names {
    /// Names an interface, from the next frame on that a capture hands out.
    pub fn set(&self, interface: Option<PortIndex>, name: &str) {
        let mut names = self.0.names.write().unwrap_or_else(PoisonError::into_inner);
        names.insert(interface, name.into());
        self.0.version.fetch_add(1, Ordering::Release);
    }

    /// The name; a number if it was never set.
    pub fn get(&self, interface: Option<PortIndex>) -> Arc<str> {
        let names = self.0.names.read().unwrap_or_else(PoisonError::into_inner);
        names.get(&interface).cloned().unwrap_or_else(|| match interface {
            None => "uplink".into(),
            Some(port) => format!("port {port}").into(),
        })
    }

    /// Changes whenever a name does.
    pub(super) fn version(&self) -> u64 {
        self.0.version.load(Ordering::Acquire)
    }
}
