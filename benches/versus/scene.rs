//! The test bed: host, wire, guest.
//!
//! ```text
//!  guest namespace        host namespace                 far namespace
//!  gst0 ==pump== fd of tap0 | macvtap <datapath> up0 ---veth--- far0
//! ```
//!
//! The far end is either a sink that counts and drops in the driver (XDP), or a real kernel
//! stack, in front of which tc programs push and pop the tag for datapaths that do VLAN work:
//! the far switch, on kernels without VLAN devices. A fresh bed is made for each measurement,
//! so that no datapath inherits queues, caches or memory from another.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use vlanswitchd::sys::bpf::{
    COUNTER_FRAMES, Direction, PerCpuArrayMap, ProgramKind, XdpMode, attach_beside_qdiscs,
    attach_xdp, load, vlan_pop_program, vlan_push_program, xdp_count_drop_program,
};

use super::datapath::{Datapath, GUEST_ADDRESS, Running, UPLINK, VLAN, other_tap, wait_for_xdp};
use super::kernel;
use super::namespace::Namespace;
use super::traffic::{Worker, pump};

/// The wire's far end.
pub const FAR_DEVICE: &str = "far0";
/// Address of the far stack.
pub const FAR_IP: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 1);
const FAR_ADDRESS: &str = "02:00:00:00:00:01";
const GUEST_DEVICE: &str = "gst0";
const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 2);

/// A datapath between a guest's descriptor and the wire.
pub struct Scene {
    // Dropped in this order: traffic, then the datapath, then the namespaces it stands in.
    pumps: Vec<Worker>,
    sink: Option<Sink>,
    /// The datapath under test.
    pub datapath: Running,
    /// Namespace of the guest's stack, if this scene has one.
    pub guest: Option<Arc<Namespace>>,
    /// Namespace of the wire's far end.
    pub far: Arc<Namespace>,
    host: Namespace,
    /// Tag that the wire carries, if any.
    pub vlan: Option<u16>,
}

/// Counts frames that reach the far end, and drops them there.
struct Sink {
    counters: PerCpuArrayMap,
    // Closing it detaches the program.
    _link: OwnedFd,
}

impl Scene {
    /// A bed whose far end is the other end of the wire, nothing more: send from it.
    pub fn with_bare_wire(datapath: &Datapath, scratch: &Path, ports: usize) -> Result<Self> {
        let (host, far) = wire()?;
        let vlan = datapath.tagged().then_some(VLAN);
        let datapath = datapath.start(&host, scratch, ports)?;
        Ok(Self {
            pumps: Vec::new(),
            sink: None,
            datapath,
            guest: None,
            far: Arc::new(far),
            host,
            vlan,
        })
    }

    /// The same, but frames without a tag get the datapath's there, beside the frame, and lose
    /// it on the way in.
    pub fn with_tagging_wire(datapath: &Datapath, scratch: &Path, ports: usize) -> Result<Self> {
        let scene = Self::with_bare_wire(datapath, scratch, ports)?;
        if let Some(vlan) = scene.vlan {
            scene.far.run(move || {
                let device = interface(FAR_DEVICE)?;
                let push =
                    load(ProgramKind::SchedCls, "bench_push", &vlan_push_program(0x8100, vlan)?)?;
                let pop = load(ProgramKind::SchedCls, "bench_pop", &vlan_pop_program()?)?;
                // Where they cost least: the far end is not what is measured.
                attach_beside_qdiscs(push.as_fd(), "bench_push", device, Direction::Egress)?;
                attach_beside_qdiscs(pop.as_fd(), "bench_pop", device, Direction::Ingress)?;
                anyhow::Ok(())
            })??;
        }
        Ok(scene)
    }

    /// A bed whose far end counts and drops.
    pub fn with_sink(datapath: &Datapath, scratch: &Path, ports: usize) -> Result<Self> {
        let mut scene = Self::with_bare_wire(datapath, scratch, ports)?;
        scene.sink = Some(scene.far.run(|| {
            let counters = PerCpuArrayMap::create("bench_sink", 2)?;
            let program = xdp_count_drop_program(counters.as_fd())?;
            let program = load(ProgramKind::Xdp, "bench_sink", &program)?;
            let link = attach_xdp(program.as_fd(), interface(FAR_DEVICE)?, XdpMode::Native)?;
            anyhow::Ok(Sink { counters, _link: link })
        })??);
        if datapath.plain_guest {
            wait_for_xdp(&scene.host)?;
        }
        Ok(scene)
    }

    /// A bed with a real network stack at either end; returns once they can talk, which proves
    /// that the datapath carries frames, and tags, both ways.
    pub fn with_stacks(datapath: &Datapath, scratch: &Path, ports: usize) -> Result<Self> {
        let mut scene = Self::with_tagging_wire(datapath, scratch, ports)?;
        scene.far.command(&format!("ip address add {FAR_IP}/24 dev {FAR_DEVICE}"))?;
        let guest = Namespace::new()?;
        let nic = guest.run(|| kernel::open_tap(GUEST_DEVICE, true))??;
        guest.command(&format!("ip link set {GUEST_DEVICE} address {GUEST_ADDRESS} up"))?;
        guest.command(&format!("ip address add {GUEST_IP}/24 dev {GUEST_DEVICE}"))?;
        scene.pumps.push(pump(&nic, &scene.datapath.guest)?);
        scene.pumps.push(pump(&scene.datapath.guest, &nic)?);
        let guest = Arc::new(guest);
        scene.guest = Some(Arc::clone(&guest));
        let end = Instant::now() + Duration::from_secs(10);
        while let Err(error) = guest.command(&format!("ping -q -n -c 1 -W 1 {FAR_IP}")) {
            if Instant::now() > end {
                bail!("no answer from the far end through the datapath: {error}");
            }
        }
        Ok(scene)
    }

    /// The guest's end of another of the daemon's ports, from 1 on.
    pub fn other_guest(&self, number: usize) -> Result<File> {
        self.host.run(move || kernel::open_tap(&other_tap(number), true))?
    }

    /// Frames the sink has counted.
    pub fn sunk(&self) -> Result<u64> {
        let sink = self.sink.as_ref().context("this scene has no sink")?;
        Ok(sink.counters.sum(COUNTER_FRAMES)?)
    }
}

/// Two namespaces joined by the wire.
fn wire() -> Result<(Namespace, Namespace)> {
    let host = Namespace::new()?;
    let far = Namespace::new()?;
    host.command(&format!(
        "ip link add {UPLINK} type veth peer name {FAR_DEVICE} netns {}",
        far.id()
    ))?;
    host.command(&format!("ip link set {UPLINK} up"))?;
    far.command(&format!("ip link set {FAR_DEVICE} address {FAR_ADDRESS} up"))?;
    Ok((host, far))
}

fn interface(name: &str) -> Result<u32> {
    nix::net::if_::if_nametoindex(name).with_context(|| format!("no device {name}"))
}
