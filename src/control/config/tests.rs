//! The file's grammar and faults, and the laws that hold for every configuration:
//! what is shown reads back as the same, a difference applied gives the new one.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use super::file::{self, FileConfig};
use super::*;
use clap::Parser;
use proptest::prelude::*;
use std::io::Write;
use std::sync::Arc;
use tempfile::NamedTempFile;

fn parse(text: &[u8]) -> (FileConfig, Vec<String>) {
    let file: Arc<Path> = Path::new("v.toml").into();
    let (config, faults) = file::parse(&file, text);
    (config, faults.iter().map(ToString::to_string).collect())
}

fn file_with(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn load(file: &Path, arguments: &[&str]) -> Result<Config, ConfigErrors> {
    let file = file.to_str().unwrap();
    let words = ["vlanswitchd", "--config", file];
    let words = words.iter().chain(arguments);
    Config::load(Arguments::try_parse_from(words).unwrap())
}

fn maps(config: &Config) -> Vec<String> {
    config.ports.iter().map(|port| port.to_map(config.tpid)).collect()
}

#[test]
fn every_key_is_understood_in_each_type_it_takes() {
    let text = r#"
switch = { datapath = "packet", poll = "busy", ring-size = 300000, control = "none", metrics = 9101, log-format = "json" }
[uplink]
device = "eth0"
tpid = 0x88A8
set-mtu = true
[[port]]
vlan = 101
device = "a"
create = true
owner = 0
group = "root"
queues = 4
offload = false
pcp = "copy"
[[port]]
vlan = "200-210,300"
device = "b"
native = 200
tpid = 0x9100
create = "no"
[[port]]
vlan = "7.8"
device = "internal:c"
mode = "access"
inner-tpid = "0x88a8"
pcp = 3
"#;
    let file = file_with(text);
    let config = load(file.path(), &[]).unwrap();
    assert_eq!(config.uplink, "eth0");
    assert_eq!((config.tpid, config.set_uplink_mtu), (Tpid::Service, Some(1500)));
    assert_eq!((config.datapath, config.poll), (Datapath::Packet, PollMode::Busy));
    assert_eq!((&config.control, config.log_format), (&Control::Off, LogFormat::Json));
    assert_eq!(config.metrics, "127.0.0.1:9101".parse().unwrap());
    assert_eq!(config.ring_size, "384k".parse().unwrap());
    let expected = [
        "101=a,pcp=copy,owner=0,group=root,queues=4,offload=off",
        "200-210,300=b,native=200,tpid=0x9100,create=no",
        "7.8=internal:c,mode=access,inner-tpid=0x88a8,pcp=3",
    ];
    assert_eq!(maps(&config), expected);
    let origin = config.ports.first().unwrap().origin.to_string();
    assert_eq!(origin, format!("{}:7", file.path().display()));
}

#[test]
fn every_fault_names_file_line_key_and_cure() {
    let cases: &[(&[u8], &str)] = &[
        (
            b"[uplink]\ndevise = 'e'",
            "v.toml:2:1: devise: no such key in [uplink]: did you mean device?",
        ),
        (
            b"[[port]]\ninner_tpid = 1",
            "v.toml:2:1: inner_tpid: no such key in [[port]]: did you mean inner-tpid?",
        ),
        (
            b"[[port]]\nspeed = 1",
            "v.toml:2:1: speed: no such key in [[port]]: the keys are vlan, device, mode,",
        ),
        (
            b"[[port]]\n  poll = 'busy'",
            "v.toml:2:3: poll: no such key in [[port]]: move it under [switch]",
        ),
        (
            b"poll = 'busy'",
            "v.toml:1:1: poll: no such key outside of the tables: move it under [switch]",
        ),
        (
            b"[ports]",
            "v.toml:1:2: ports: no such key outside of the tables: did you mean [[port]]?",
        ),
        (
            b"zzz = 1",
            "v.toml:1:1: zzz: no such key outside of the tables: the tables are [uplink], [switch], [[port]]",
        ),
        (
            b"[port]\nvlan = 1",
            "v.toml:1:2: port: write each port under a line [[port]], with two brackets",
        ),
        (b"port = [{ vlan = 1 }]", "v.toml:1:1: port: write each port under a line [[port]]"),
        (b"uplink = 'eth0'", "v.toml:1:1: uplink: write it as a table: a line [uplink],"),
        (b"[[uplink]]\ndevice = 'e'", "v.toml:1:3: uplink: write it as a table"),
        (
            b"[[port]]\nvlan = 101.20",
            "v.toml:2:8: vlan: write 101, or in quotes \"200-210,300\" or \"101.20\"",
        ),
        (b"[[port]]\nvlan = [200, 201]", "v.toml:2:8: vlan: write 101, or in quotes"),
        (b"[[port]]\ncreate = 1", "v.toml:2:10: create: write true or false"),
        (b"[[port]]\nnative = true", "v.toml:2:10: native: write a VLAN of the list"),
        (b"[[port]]\nmode.x = 1", "mode: write \"tunnel\", \"access\" or \"trunk\""),
        (b"[uplink]\ntpid = 8100", "v.toml:2:8: tpid: 8100 is no TPID: write 0x8100, 0x88a8"),
        (
            b"[uplink]\nset-mtu = 1",
            "v.toml:2:11: set-mtu: 1 is no guest MTU: write a number from 576 to 65000",
        ),
        (
            b"[switch]\npoll = 'never'",
            "v.toml:2:8: poll: 'never' is no choice: choose adaptive, busy or sleep",
        ),
        (b"[switch]\nmetrics = 'x'", "v.toml:2:11: metrics: 'x' is no address: write ADDRESS:PORT"),
        (b"[switch]\ncontrol = ''", "v.toml:2:11: control: it is empty: write a path, or none"),
        (
            b"[[port]]\nvlan = 1\nvlan = 2",
            "v.toml:3:1: vlan: stands here a second time: remove one",
        ),
        (b"[uplink]\n[uplink]", "v.toml:2:2: uplink: stands here a second time: remove one"),
        (b"[[port]]\nvlan = ", "v.toml:2:8: this is no TOML: "),
        (b"[[port]]\ndevice = tap", "v.toml:2:10: this is no TOML: "),
        (b"[[port]]\n\"a\\nb\" = 1", "v.toml:2:1: a\\nb: no such key"),
        (b"[[port]]\n# \xc3\xa9\xff", "v.toml:2:4: this is not UTF-8"),
    ];
    for (text, expected) in cases {
        let (_, faults) = parse(text);
        assert_eq!(faults.len(), 1, "{expected}: {faults:?}");
        let fault = faults.first().unwrap();
        assert!(fault.contains(expected), "expected {expected}\n     got {fault}");
        assert!(!fault.contains('\n'), "{fault}");
    }
}

#[test]
fn all_faults_are_told_at_once_and_both_places_of_a_clash() {
    let file = file_with(
        "[uplink]\ndevice = 'eth0'\n[switch]\npol = 'busy'\n[[port]]\nvlan = 5\ndevice = 'a'\n\
         [[port]]\nvlan = 5\ndevice = 'b'\n[[port]]\nvlan = 6\ndevice = 'a'\n\
         [[port]]\nvlan = 7\ndevice = 'eth0'\n[[port]]\ndevice = 'c'\n[[port]]\nvlan = 9\n\
         device = 'd'\nmode = 'bridge'\n",
    );
    let name = file.path().display();
    let errors = load(file.path(), &["--map", "5=x", "--tpid", "1", "--map", "y"]).unwrap_err();
    let told = errors.to_string();
    let expected = [
        format!("{name}:4:1: pol: "),
        "--tpid=1: ".to_owned(),
        "--map y: no '='".to_owned(),
        format!("{name}:17: vlan is missing: add a line such as vlan = 101"),
        format!("{name}:22: mode=bridge: choose"),
        format!("{name}:11: device: a is mapped already, by {name}:5: "),
        format!("{name}:14: device: eth0 is the uplink itself, by {name}:2: "),
        format!("{name}:8: vlan: VLAN 5 (TPID 0x8100) belongs to {name}:5 already"),
        format!("--map 5=x: VLAN 5 (TPID 0x8100) belongs to {name}:5 already"),
    ];
    assert_eq!(told.lines().count(), expected.len(), "{told}");
    for (line, expected) in told.lines().zip(expected) {
        assert!(line.starts_with(&expected), "expected {expected}\n     got {line}");
    }
}

#[test]
fn the_command_line_is_laid_over_the_file() {
    let file = file_with(
        "[uplink]\ndevice = 'eth0'\ntpid = 0x88a8\nset-mtu = 9000\n[switch]\npoll = 'busy'\n\
         log-format = 'json'\nring-size = '1M'\ncontrol = '/c'\nmetrics = 1\n[[port]]\nvlan = 5\ndevice = 'a'\n",
    );
    let file_only = load(file.path(), &[]).unwrap();
    assert_eq!((file_only.uplink.as_str(), file_only.set_uplink_mtu), ("eth0", Some(9000)));
    let over = "--uplink eth1 --tpid 0x8100 --set-uplink-mtu --poll sleep --log-format text \
                --ring-size 512k --control none --metrics none --map 6=b";
    let config = load(file.path(), &over.split_whitespace().collect::<Vec<_>>()).unwrap();
    assert_eq!((config.uplink.as_str(), config.set_uplink_mtu), ("eth1", Some(1500)));
    assert_eq!((config.poll, config.log_format), (PollMode::Sleep, LogFormat::Text));
    assert_eq!((&config.control, &config.metrics), (&Control::Off, &Metrics::Off));
    assert_eq!((file_only.ring_size.bytes(1), config.ring_size.bytes(1)), (1 << 20, 512 << 10));
    assert_eq!(maps(&config), ["5=a", "6=b"]);
    let fixed: Vec<&str> =
        diff::fixed_settings(&file_only, &config).iter().map(|one| one.key).collect();
    let expected = ["device", "set-mtu", "poll", "ring-size", "control", "metrics", "log-format"];
    assert_eq!(fixed, expected);
}

#[test]
fn a_switch_without_ports_needs_a_way_to_get_them() {
    let run = |words: &[&str]| {
        let words = ["vlanswitchd"].iter().chain(words);
        Config::load(Arguments::try_parse_from(words).unwrap()).map_err(|errors| errors.to_string())
    };
    // Without a file this depends on the host: only where there is none.
    if !Path::new(DEFAULT_FILE).exists() {
        let told = run(&["--uplink", "eth0"]).unwrap_err();
        assert!(told.starts_with("no port: give a --map"), "{told}");
        assert!(run(&["--uplink", "eth0", "--control", "none"]).is_err());
        let told = run(&["--map", "5=a"]).unwrap_err();
        assert!(told.starts_with("no uplink: name the trunk with --uplink IF"), "{told}");
    }
    assert!(run(&["--uplink", "eth0", "--control", "/run/c"]).unwrap().ports.is_empty());
    let file = file_with("[uplink]\ndevice = 'eth0'\n");
    assert!(load(file.path(), &[]).unwrap().ports.is_empty());
}

#[test]
fn a_reload_reads_the_file_again_under_the_same_command_line() {
    let mut file = file_with("[uplink]\ndevice = 'eth0'\n[[port]]\nvlan = 5\ndevice = 'a'\n");
    let config = load(file.path(), &["--map", "6=b"]).unwrap();
    file.write_all(b"[[port]]\nvlan = 7\ndevice = 'c'\n").unwrap();
    let after = config.reload().unwrap();
    assert_eq!(maps(&after), ["5=a", "7=c", "6=b"]);
    let diff = diff::ports(&config.ports, &after.ports);
    assert_eq!((diff.added.len(), diff.unchanged.len(), diff.is_empty()), (1, 2, false));
    assert!(diff::fixed_settings(&config, &after).is_empty());
    file.write_all(b"[[port]]\n").unwrap();
    assert!(config.reload().is_err());
    drop(file);
    let told = config.reload().unwrap_err().to_string();
    assert!(told.contains("cannot be read: No such file"), "{told}");
}

/// Without it there would be no port left, and nobody meant that.
#[test]
fn a_default_file_that_is_gone_is_a_fault_for_a_running_switch() {
    let file = file_with("[uplink]\ndevice = 'eth0'\n[[port]]\nvlan = 5\ndevice = 'a'\n");
    let words = ["vlanswitchd", "--map", "6=b", "--uplink", "eth0"];
    let arguments = || Arguments::try_parse_from(words).unwrap();
    let config = Config::load_or(arguments(), file.path()).unwrap();
    assert_eq!(maps(&config), ["5=a", "6=b"]);
    let path = file.path().to_owned();
    drop(file);
    let told = config.reload().unwrap_err().to_string();
    assert!(told.starts_with(&format!("{}: cannot be read", path.display())), "{told}");
    assert_eq!(maps(&Config::load_or(arguments(), &path).unwrap()), ["6=b"]);
}

#[test]
fn other_ports_are_checked_as_if_they_had_been_written() {
    let file = file_with("[uplink]\ndevice = 'eth0'\n[[port]]\nvlan = 5\ndevice = 'a'\n");
    let config = load(file.path(), &[]).unwrap();
    let with = |map: &str| {
        let port = mapping::parse(map, config.tpid).unwrap();
        let ports = config.ports.iter().cloned().chain([port]).collect();
        config.with_ports(ports).map_err(|errors| errors.to_string())
    };
    assert_eq!(maps(&with("6=b").unwrap()), ["5=a", "6=b"]);
    let told = with("5=b").unwrap_err();
    let expected = "the control socket's 5=b: VLAN 5 (TPID 0x8100) belongs to ";
    assert!(told.starts_with(expected), "{told}");
    assert!(with("6=eth0").unwrap_err().contains("eth0 is the uplink itself, by "));
}

/// Maps without clashes: port N has VLANs in the hundred of its own.
fn map(number: u16) -> impl Strategy<Value = String> {
    let first = 100 * (number + 1);
    let vlans = prop_oneof![
        (first..first + 90).prop_map(|vid| (vid.to_string(), "tunnel")),
        (first..first + 90).prop_map(|vid| (format!("{vid}-{vid}"), "trunk")),
        (first..first + 40, 50..90_u16)
            .prop_map(move |(low, high)| (format!("{low}-{},{}", low + 5, first + high), "trunk")),
        (first..first + 90, 1..4095_u16)
            .prop_map(|(vid, inner)| (format!("{vid}.{inner}"), "pair")),
    ];
    let tpid = prop::option::of(prop_oneof![Just("0x8100"), Just("0x88a8"), Just("0x9200")]);
    let pcp = prop::option::of(prop_oneof![Just("0"), Just("7"), Just("copy")]);
    let kind = prop_oneof![
        Just(""),
        Just(",create=no"),
        Just(",owner=0,queues=3"),
        Just(",owner=root,group=12"),
    ];
    let police = prop_oneof![
        Just(""),
        Just(",rate=1500M,storm=1"),
        Just(",rate=64001,burst=123456"),
        Just(",mac=52:54:00:00:00:01+02:00:00:00:00:02,storm=25k"),
    ];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (vlans, tpid, pcp, kind, police, flags).prop_map(
        move |((vlans, shape), tpid, pcp, kind, police, (off, mode, internal))| {
            let device =
                if internal { format!("internal:t{number}") } else { format!("t{number}") };
            let mut map = format!("{vlans}={device}");
            if !internal {
                map += kind;
            }
            if mode {
                map += match shape {
                    "trunk" => ",mode=trunk",
                    _ => ",mode=access",
                };
            }
            if shape == "trunk" && off {
                let native: String = vlans.chars().take_while(char::is_ascii_digit).collect();
                map += &format!(",native={native}");
            }
            if shape == "pair" && mode {
                map += ",inner-tpid=0x88a8";
            }
            for (key, value) in [("tpid", tpid), ("pcp", pcp), ("offload", off.then_some("off"))] {
                map += &value.map(|value| format!(",{key}={value}")).unwrap_or_default();
            }
            map += police;
            map
        },
    )
}

fn port_list() -> impl Strategy<Value = Vec<String>> {
    let each: Vec<_> = (0..8_u16).map(|number| prop::option::of(map(number))).collect();
    each.prop_map(|maps| maps.into_iter().flatten().collect()).prop_shuffle()
}

fn arguments() -> impl Strategy<Value = Vec<String>> {
    let pick = |option: &'static str, values: &'static [&'static str]| {
        prop::option::of(prop::sample::select(values))
            .prop_map(move |value| value.map(|value| format!("{option}={value}")))
    };
    let options = (
        pick("--tpid", &["0x8100", "0x88a8", "0x9100"]),
        pick("--poll", &["adaptive", "busy", "sleep"]),
        pick("--datapath", &["auto", "packet"]),
        pick("--ring-size", &["auto", "200k", "4M"]),
        pick("--set-uplink-mtu", &["1500", "9000"]),
        pick("--control", &["none", "/run/a b/\"c\""]),
        pick("--metrics", &["none", "9101", "[::1]:9", "unix:/m\\n"]),
        pick("--log-format", &["text", "json"]),
        port_list(),
    );
    options.prop_map(|(tpid, poll, datapath, ring, mtu, control, metrics, format, ports)| {
        let options = [tpid, poll, datapath, ring, mtu, control, metrics, format];
        let ports = ports.into_iter().map(|map| format!("--map={map}"));
        options.into_iter().flatten().chain(ports).collect()
    })
}

/// Order is not part of a difference.
fn sorted<'p>(ports: impl IntoIterator<Item = &'p PortConfig>) -> Vec<&'p PortConfig> {
    let mut ports: Vec<_> = ports.into_iter().collect();
    ports.sort_by_key(|port| port.device.clone());
    ports
}

proptest! {
    #[test]
    fn what_is_shown_reads_back_as_the_same(words in arguments()) {
        let empty = file_with("[uplink]\ndevice = 'eth \"0'\n");
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let config = load(empty.path(), &words).unwrap();
        let text = show::to_toml(&config);
        let again = load(file_with(&text).path(), &[]).unwrap_or_else(|errors| panic!("{errors}\n{text}"));
        prop_assert_eq!(&config.ports, &again.ports, "{}", text);
        prop_assert_eq!(config.settings(), again.settings(), "{}", text);
        prop_assert_eq!(show::to_toml(&again), text);
    }

    #[test]
    fn a_map_shown_reads_back_as_the_same(map in map(3), tpid in prop::sample::select(&Tpid::ALL[..])) {
        let port = mapping::parse(&map, Tpid::Customer).unwrap();
        prop_assert_eq!(&mapping::parse(&port.to_map(tpid), tpid).unwrap(), &port);
        prop_assert_eq!(&port.with_changes(&[], tpid).unwrap(), &port);
    }

    #[test]
    fn a_difference_applied_to_the_old_gives_the_new(old in port_list(), new in port_list()) {
        let port = |map: &String| mapping::parse(map, Tpid::Customer).unwrap();
        let old: Vec<_> = old.iter().map(port).collect();
        let new: Vec<_> = new.iter().map(port).collect();
        let diff = diff::ports(&old, &new);
        let mut applied = old.clone();
        applied.retain(|port| !diff.removed.contains(&port));
        for (before, after) in &diff.changed {
            let place = applied.iter_mut().find(|port| port == before).unwrap();
            prop_assert_eq!(&place.device, &after.device);
            place.clone_from(after);
        }
        applied.extend(diff.added.iter().map(|port| (*port).clone()));
        prop_assert_eq!(sorted(&applied), sorted(&new));
        let untouched = old.iter().filter(|port| new.contains(port));
        prop_assert_eq!(sorted(diff.unchanged.iter().copied()), sorted(untouched));
        prop_assert!(diff::ports(&new, &new).is_empty());
    }

    #[test]
    fn no_bytes_harm_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        parse(&bytes);
    }

    #[test]
    fn no_toml_harms_the_reader(pieces in prop::collection::vec(prop::sample::select(&[
        "[uplink]", "[switch]", "[[port]]", "[port]", "[port.vlan]", "vlan", "device", "tpid", "create",
        "=", ".", " ", "\n", "\r\n", "'a'", "\"\u{e9}\"", "1.5", "0x88a8", "[1]", "{a=1}", "true", "#", "1979-05-27",
    ][..]), 0..40)) {
        let (_, faults) = parse(pieces.concat().as_bytes());
        for fault in faults {
            prop_assert!(!fault.contains('\n'), "{}", fault);
        }
    }
}
