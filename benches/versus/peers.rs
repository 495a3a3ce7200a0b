//! Other ways to give a guest a VLAN: each set up as its own documentation says, at its best.

use std::path::Path;

use anyhow::{Context, Result};

use super::datapath::{
    Children, Running, TAP, UPLINK, VLAN, start_logged, start_macvtap, wait_for,
};
use super::kernel;
use super::namespace::Namespace;

const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

/// What vlanswitchd is compared with, besides macvtap on the bare uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A VLAN device on the uplink with a macvtap on it: what vlanswitchd replaces.
    MacvtapOnVlan,
    /// The kernel's bridge with VLAN filtering, uplink and tap as its ports.
    Bridge,
    /// Open vSwitch with its userspace datapath, tap and uplink as system devices, segmentation
    /// offload on, and one flow each way (no learning, no flooding).
    OpenVswitch,
    /// DPDK's testpmd on two AF_PACKET devices: does no VLAN work, one core spins.
    Testpmd,
}

impl Peer {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::MacvtapOnVlan, Self::Bridge, Self::OpenVswitch, Self::Testpmd];

    /// Name of the column.
    pub fn name(self) -> &'static str {
        match self {
            Self::MacvtapOnVlan => "macvtap-on-vlan",
            Self::Bridge => "bridge",
            Self::OpenVswitch => "ovs-userspace",
            Self::Testpmd => "dpdk-testpmd",
        }
    }

    /// Whether it puts tags on the uplink.
    pub fn tagged(self) -> bool {
        self != Self::Testpmd
    }

    /// Why bulk TCP is not measured with it, if so.
    pub fn cannot_offload(self) -> Option<&'static str> {
        (self == Self::Testpmd)
            .then_some("DPDK's AF_PACKET devices carry no virtio header: checksum and segmentation offloads are lost")
    }

    /// Why this machine cannot run it, if so.
    pub fn absent(self) -> Option<String> {
        let missing = |program: &str, package: &str| {
            let found = std::env::var_os("PATH").is_some_and(|path| {
                std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
            });
            (!found).then(|| format!("{program} is not installed (Debian package {package})"))
        };
        let refused = |commands: &[&str]| {
            let tried = Namespace::new().and_then(|namespace| {
                commands.iter().try_for_each(|command| namespace.command(command).map(drop))
            });
            tried.err().map(|error| format!("this kernel cannot do it: {error}"))
        };
        match self {
            Self::MacvtapOnVlan => refused(&[
                "ip link add probe0 type veth peer name probe1",
                "ip link add link probe0 name probe0.1 type vlan id 1",
            ]),
            Self::Bridge => refused(&["ip link add probe0 type bridge vlan_filtering 1"]),
            Self::OpenVswitch => missing("ovs-vswitchd", "openvswitch-switch")
                .or_else(|| (!Path::new(SCHEMA).is_file()).then(|| format!("{SCHEMA} is missing"))),
            Self::Testpmd => missing("dpdk-testpmd", "dpdk-dev"),
        }
    }

    /// Starts it in `host`; returns when it forwards.
    pub fn start(self, host: &Namespace, scratch: &Path) -> Result<Running> {
        match self {
            Self::MacvtapOnVlan => {
                host.command(&format!("ip link add link {UPLINK} name vlan0 type vlan id {VLAN}"))?;
                host.command("ip link set vlan0 up")?;
                start_macvtap(host, "vlan0", scratch)
            }
            Self::Bridge => start_bridge(host),
            Self::OpenVswitch => start_openvswitch(host, scratch),
            Self::Testpmd => start_testpmd(host, scratch),
        }
    }
}

/// A tap that is up, opened as its guest would.
fn tap(host: &Namespace) -> Result<std::fs::File> {
    let guest = host.run(|| kernel::open_tap(TAP, true))??;
    host.command(&format!("ip link set {TAP} up"))?;
    Ok(guest)
}

fn start_bridge(host: &Namespace) -> Result<Running> {
    let guest = tap(host)?;
    for command in [
        "ip link add br0 type bridge vlan_filtering 1 vlan_default_pvid 0".to_owned(),
        "ip link set br0 up".into(),
        format!("ip link set {UPLINK} master br0"),
        format!("ip link set {TAP} master br0"),
        format!("bridge vlan add dev {UPLINK} vid {VLAN}"),
        format!("bridge vlan add dev {TAP} vid {VLAN} pvid untagged"),
    ] {
        host.command(&command)?;
    }
    Ok(Running { guest, children: Vec::new() })
}

fn start_openvswitch(host: &Namespace, scratch: &Path) -> Result<Running> {
    let guest = tap(host)?;
    // A folder of its own for each start: sockets of an earlier one may still be there.
    let folder = scratch.join("openvswitch");
    // Absent the first time.
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir(&folder)?;
    let path = |name: &str| folder.join(name).display().to_string();
    let database = format!("unix:{}", path("db.sock"));
    host.command(&format!("ovsdb-tool create {} {SCHEMA}", path("conf.db")))?;
    // `env` because the folder is told by environment variables only.
    let environment =
        ["RUN", "DB", "LOG", "SYSCONF"].map(|what| format!("OVS_{what}DIR={}", folder.display()));
    let program = |words: &[String]| -> Vec<String> {
        environment.iter().cloned().chain(words.to_vec()).collect()
    };
    let server = program(&[
        "ovsdb-server".into(),
        path("conf.db"),
        format!("--remote=p{database}"),
        format!("--unixctl={}", path("db.ctl")),
    ]);
    let (child, log) = start_logged(host, "ovsdb-server", "env", &server, scratch)?;
    let mut running = Children(vec![child]);
    wait_for(&mut running, &log, "serving its database", || {
        Ok(Path::new(&path("db.sock")).exists())
    })?;
    let control = |words: &str| {
        let words = format!("ovs-vsctl --db={database} --timeout=20 {words}");
        host.command(&words).map(drop)
    };
    // Before the switch starts: this setting is read once.
    control("--no-wait init -- set Open_vSwitch . other_config:userspace-tso-enable=true")?;
    let switch = program(&[
        "ovs-vswitchd".into(),
        database.clone(),
        format!("--unixctl={}", path("switch.ctl")),
    ]);
    let (child, log) = start_logged(host, "ovs-vswitchd", "env", &switch, scratch)?;
    running.0.push(child);
    control(&format!(
        "add-br br0 -- set bridge br0 datapath_type=netdev fail_mode=secure \
         -- add-port br0 {UPLINK} -- set interface {UPLINK} ofport_request=1 \
         -- add-port br0 {TAP} -- set interface {TAP} ofport_request=2"
    ))?;
    let management = path("br0.mgmt");
    wait_for(&mut running, &log, "open for management", || Ok(Path::new(&management).exists()))?;
    // OpenFlow 1.3: 4096 is the bit that says that there is a tag.
    let tag = 4096 + VLAN;
    for flow in [
        format!("in_port=2,actions=push_vlan:0x8100,set_field:{tag}->vlan_vid,output:1"),
        format!("in_port=1,vlan_vid={tag},actions=pop_vlan,output:2"),
    ] {
        host.command(&format!("ovs-ofctl -O OpenFlow13 add-flow {management} {flow}"))
            .context("the switch took no flow")?;
    }
    Ok(Running { guest, children: running.take() })
}

fn start_testpmd(host: &Namespace, scratch: &Path) -> Result<Running> {
    let guest = tap(host)?;
    let everywhere = super::machine::processors().saturating_sub(1);
    let words = format!(
        "--no-huge -m 512 --no-pci --no-telemetry --lcores 0@(0-{everywhere}),1@(0-{everywhere}) \
         --file-prefix bench{} --vdev=net_af_packet0,iface={UPLINK} --vdev=net_af_packet1,iface={TAP} \
         -- --total-num-mbufs 32768 --forward-mode=io --auto-start --stats-period 1 --no-lsc-interrupt",
        std::process::id()
    );
    let arguments: Vec<String> = words.split_whitespace().map(String::from).collect();
    let (child, log) = start_logged(host, "dpdk-testpmd", "dpdk-testpmd", &arguments, scratch)?;
    let mut running = Children(vec![child]);
    wait_for(&mut running, &log, "forwarding", || {
        Ok(std::fs::read_to_string(&log)?.contains("Port statistics"))
    })?;
    Ok(Running { guest, children: running.take() })
}
