//! The grammar, the checks, and the way back into words.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]
use super::*;
use crate::frame::Vid;
use crate::switch::{Mode, Rate, Storm};
use std::path::Path;

fn parse_all(maps: &[String]) -> Result<(Vec<PortConfig>, Table), Vec<MapError>> {
    let specs: Vec<_> = maps.iter().map(|map| argument(map).unwrap()).collect();
    let uplink = Uplink { device: "eth0", place: "--uplink eth0" };
    build_all(&specs, Some(uplink), Tpid::Customer)
}

fn port(map: &str) -> PortConfig {
    parse(map, Tpid::Customer).unwrap_or_else(|problem| panic!("{map}: {problem}"))
}

#[test]
fn the_grammar_of_the_design_is_understood() {
    let web = port("101=tap-web1");
    assert_eq!(web.device, "tap-web1");
    assert_eq!(web.membership.mode(), Mode::Tunnel);
    let tap = TapConfig { queues: 1, ..TapConfig::default() };
    assert_eq!(web.kind, DeviceKind::Netdev { create: Some(tap) });

    let trunk = port("200-202,300=tap-fw,native=300,pcp=copy,tpid=0x88a8,create=no");
    assert_eq!(trunk.membership.vlans().to_string(), "200-202,300");
    assert_eq!(trunk.membership.native(), Vid::new(300));
    assert_eq!(trunk.membership.tpid(), Tpid::Service);
    assert_eq!(trunk.membership.priority(), Priority::Copy);
    assert_eq!(trunk.kind, DeviceKind::Netdev { create: None });

    let pair = port("101.20=veth0,inner-tpid=0x88a8,mode=access");
    assert_eq!(pair.membership.vlans().to_string(), "101.20");
    assert_eq!(pair.membership.inner_tpid(), Tpid::Service);

    assert_eq!(port("0=tap0").membership.mode(), Mode::Access);
    assert_eq!(port("7=internal:leg").kind, DeviceKind::Internal);
    let tap = port("9=t,owner=0,group=root,queues=4,offload=off,pcp=5");
    assert!(tap.offload_off);
    let account = |given: &str| Some(Account { id: 0, given: given.to_owned() });
    let expected = TapConfig { owner: account("0"), group: account("root"), queues: 4 };
    assert_eq!(tap.kind, DeviceKind::Netdev { create: Some(expected) });

    let held = port("9=t,rate=1.5G,burst=2M,storm=1k,mac=52:54:00:12:34:56+02:00:00:00:00:01");
    let expected = PoliceRule {
        rate: Rate::new(1_500_000_000, Some(2_000_000)),
        storm: Storm::new(1000),
        macs: [[0x52, 0x54, 0, 0x12, 0x34, 0x56], [2, 0, 0, 0, 0, 1]].into_iter().collect(),
    };
    assert_eq!(held.police, expected);
    assert_eq!(port("9=t,rate=100M").police.rate, Rate::new(100_000_000, None));
    assert!(port("9=t").police.is_empty());
}

#[test]
fn every_refusal_names_the_value_and_the_cure() {
    let cases = [
        ("tap-web1", "VLANS=DEVICE"),
        ("=tap", "'' is no VLAN"),
        ("+5=tap", "'+5' is no VLAN"),
        ("4095=tap", "VLAN 4095 is outside 0..4094"),
        ("70000=tap", "VLAN 70000 is outside"),
        ("5-=tap", "'' is no VLAN"),
        ("9-5=tap", "the range '9-5' goes down"),
        ("0,5=tap", "VLAN 0 (untagged) cannot be part of '0,5'"),
        ("0.5=tap", "VLAN 0 (untagged) cannot be part of"),
        ("1-5,3=tap", "VLAN 3 stands in the list twice"),
        ("1.2.3=tap", "'2.3' is no VLAN"),
        ("5=", "it is empty"),
        ("5=a-name-of-16-byte", "longer than 15 bytes"),
        ("5=a/b", "slash"),
        ("5=tap,", "unknown option ''"),
        ("5=tap,mtu=9", "unknown option 'mtu=9': the options are mode"),
        ("5=tap,mode=access,mode=trunk", "option mode is given twice"),
        ("5=tap,mode=bridge", "mode=bridge: choose tunnel, access or trunk"),
        ("5=tap,tpid=8100", "tpid=8100: choose 0x8100"),
        ("5=tap,pcp=8", "pcp=8: choose a priority from 0 to 7"),
        ("5=tap,create=maybe", "create=maybe: choose yes or no"),
        ("5=tap,queues=0", "queues=0: choose a number from 1 to 256"),
        ("5=tap,create=no,owner=root", "owner is for taps that vlanswitchd creates"),
        ("5=internal:leg,queues=2", "queues is for taps that vlanswitchd creates"),
        ("5=internal:leg,create=yes", "an internal port is always created"),
        ("5=tap,owner=nobody-of-that-name", "no such owner"),
        ("5=tap,native=5", "native=5 works with mode=trunk only"),
        ("5-6=tap,native=7", "native=7 is not one of the port's VLANs (5-6)"),
        ("5-6=tap,mode=access", "a list of VLANs needs mode=trunk"),
        ("0=tap,mode=tunnel", "works in mode=access only"),
        ("5.6=tap,mode=trunk", "not mode=trunk"),
        ("5=tap,inner-tpid=0x8100", "inner-tpid works with a tag pair"),
        ("5=tap,rate=fast", "rate=fast: write bits a second from 1k to 1T"),
        ("5=tap,rate=100", "rate=100: write bits a second from 1k to 1T"),
        ("5=tap,rate=1.1T", "rate=1.1T: write bits a second"),
        ("5=tap,rate=10Mbit", "rate=10Mbit: write bits a second"),
        ("5=tap,burst=100k", "burst=100k: it works with rate only: add rate=BITS"),
        ("5=tap,rate=1M,burst=1500", "burst=1500: write bytes from 80k to 1G"),
        ("5=tap,storm=0", "storm=0: write frames a second from 1 to 100M"),
        ("5=tap,storm=5G", "storm=5G: write frames a second"),
        ("5=tap,mac=x", "mac=x: write addresses such as 52:54:00:12:34:56"),
        ("5=tap,mac=33:33:00:00:00:01", "mac=33:33:00:00:00:01: this can be no source address"),
        ("5=tap,mac=00:00:00:00:00:00", "this can be no source address"),
        (
            "5=tap,mac=02:00:00:00:00:0a+02:00:00:00:00:0A",
            "02:00:00:00:00:0A: this address is given",
        ),
    ];
    for (map, expected) in cases {
        let message = parse(map, Tpid::Customer).err().map(|problem| problem.to_string());
        assert!(message.as_ref().is_some_and(|text| text.contains(expected)), "{map}: {message:?}");
    }
}

#[test]
fn mappings_are_checked_against_each_other() {
    let cases = [
        (["5=a", "6=a"], "a is mapped already, by --map 5=a"),
        (["5=a", "5=b"], "VLAN 5 (TPID 0x8100) belongs to --map 5=a already"),
        (["5=a", "5.6=b"], "VLAN 5 (TPID 0x8100) belongs to --map 5=a already"),
        (["5.6=a", "5.6=b"], "the tag pair 5.6"),
        (["5=a", "6=eth0"], "eth0 is the uplink itself"),
        (["5=a", "6=internal:a"], "a is mapped already"),
    ];
    for (maps, expected) in cases {
        let maps = maps.map(str::to_owned);
        let errors = parse_all(&maps).unwrap_err();
        assert_eq!(errors.len(), 1, "{maps:?}: {errors:?}");
        let message = errors[0].to_string();
        assert!(message.contains(expected), "{maps:?}: {message}");
        let second = maps.last().cloned().unwrap_or_default();
        assert!(message.starts_with(&format!("--map {second}: ")), "{message}");
    }
    let maps = ["5=a", "5=b,tpid=0x88a8", "0=c"].map(str::to_owned);
    let (ports, table) = parse_all(&maps).unwrap();
    assert_eq!((ports.len(), table.claims().len()), (3, 3));
}

#[test]
fn all_faults_are_told_at_once() {
    let maps = ["5=a", "6=b,queues=0", "5=c", "7=a", "5.3=d"].map(str::to_owned);
    let errors = parse_all(&maps).unwrap_err();
    let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
    let starts = ["--map 6=b,queues=0: ", "--map 7=a: ", "--map 5=c: ", "--map 5.3=d: "];
    assert_eq!(told.len(), starts.len(), "{told:?}");
    for (text, start) in told.iter().zip(starts) {
        assert!(text.starts_with(start), "{told:?}");
    }
}

#[test]
fn a_refusal_is_one_line_whatever_is_refused() {
    let error = argument("5=a\nb,mode=\u{1b}[31m").unwrap().build(Tpid::Customer).unwrap_err();
    let text = error.to_string();
    assert!(!text.contains(char::is_control), "{text}");
    assert!(text.starts_with("--map 5=a\\nb,mode="), "{text}");
}

#[test]
fn a_port_in_a_file_is_refused_at_the_keys_line() {
    let mut spec = PortSpec::new(Origin::File { file: Path::new("/etc/v.toml").into(), line: 4 });
    let refused = |spec: &PortSpec| spec.build(Tpid::Customer).unwrap_err().to_string();
    assert!(refused(&spec).starts_with("/etc/v.toml:4: vlan is missing: add a line such as"));
    spec.set(VLAN, "4095".to_owned(), Some(5));
    assert!(refused(&spec).starts_with("/etc/v.toml:5: vlan: VLAN 4095 is outside"));
    spec.set(VLAN, "5".to_owned(), Some(5));
    spec.set(DEVICE, "a,b".to_owned(), Some(6));
    assert!(refused(&spec).starts_with("/etc/v.toml:6: device: 'a,b' cannot name a device"));
    spec.set(DEVICE, "tap".to_owned(), Some(6));
    spec.set("owner", "nobody-of-that-name".to_owned(), Some(7));
    assert!(refused(&spec).starts_with("/etc/v.toml:7: owner=nobody-of-that-name: this host"));
}

#[test]
fn maps_come_back_as_they_were_without_what_is_the_default() {
    for (map, expected) in [
        ("101=tap-web1", "101=tap-web1"),
        ("101=tap,mode=tunnel,create=yes,queues=1,pcp=0,offload=auto,tpid=0x8100", "101=tap"),
        ("300,200-202=t,native=300,pcp=copy", "200-202,300=t,native=300,pcp=copy"),
        ("5-5=t", "5-5=t"),
        ("5=t,mode=trunk,native=5", "5=t,mode=trunk,native=5"),
        ("1.2=t,mode=access,inner-tpid=0x88a8", "1.2=t,mode=access,inner-tpid=0x88a8"),
        ("7=internal:leg", "7=internal:leg"),
        ("7=t,create=no,offload=off,pcp=7", "7=t,pcp=7,create=no,offload=off"),
        (
            "7=t,mac=02:00:00:00:0B:01,storm=2000,burst=90000,rate=64.5k",
            "7=t,rate=64500,burst=90k,storm=2k,mac=02:00:00:00:0b:01",
        ),
        ("7=t,rate=1000M,burst=25M", "7=t,rate=1G"),
        ("7=internal:t,rate=1500M,burst=9M", "7=internal:t,rate=1500M,burst=9M"),
        ("7=t,group=0,owner=root,queues=4", "7=t,owner=root,group=0,queues=4"),
    ] {
        let port = port(map);
        assert_eq!(port.to_map(Tpid::Customer), expected);
        assert_eq!(parse(expected, Tpid::Customer).unwrap(), port);
    }
    assert_eq!(port("5=t").to_map(Tpid::Service), "5=t,tpid=0x8100");
    let service = parse("5=t", Tpid::Service).unwrap();
    assert_eq!(service.to_map(Tpid::Service), "5=t");
    assert_eq!(service.to_map(Tpid::Customer), "5=t,tpid=0x88a8");
}

#[test]
fn changes_are_refused_or_made_as_if_the_map_had_been_so() {
    let change = |map: &str, changes: &[(&str, &str)]| {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let changes: Vec<_> = changes.iter().map(own).collect();
        port(map)
            .with_changes(&changes, Tpid::Customer)
            .map(|port| port.to_map(Tpid::Customer))
            .map_err(|problem| problem.to_string())
    };
    assert_eq!(change("5=t", &[("vlan", "6")]).unwrap(), "6=t");
    assert_eq!(change("5=t", &[("vlan", "6-7"), ("native", "6")]).unwrap(), "6-7=t,native=6");
    assert_eq!(change("6-7=t,native=6", &[("native", "")]).unwrap(), "6-7=t");
    assert_eq!(change("5=internal:t", &[("pcp", "3")]).unwrap(), "5=internal:t,pcp=3");
    assert_eq!(change("5=t,tpid=0x88a8", &[("tpid", "")]).unwrap(), "5=t");
    assert_eq!(
        change("5=t,rate=1M", &[("rate", "2G"), ("storm", "9")]).unwrap(),
        "5=t,rate=2G,storm=9"
    );
    assert_eq!(change("5=t,rate=1M,burst=90k", &[("rate", ""), ("burst", "")]).unwrap(), "5=t");
    for (map, changes, expected) in [
        ("5=t", &[("vlan", "")][..], "'' is no VLAN"),
        ("5=t", &[("device", "u")], "unknown option 'device'"),
        ("5=t", &[("pcp", "1"), ("pcp", "2")], "option pcp is given twice"),
        ("6-7=t,native=6", &[("vlan", "7-8")], "native=6 is not one of"),
        ("5=t,rate=1M,burst=90k", &[("rate", "")], "burst=90k: it works with rate only"),
        ("5=t,create=no", &[("queues", "2")], "queues is for taps that vlanswitchd creates"),
    ] {
        let message = change(map, changes).unwrap_err();
        assert!(message.contains(expected), "{map}: {message}");
    }
}
