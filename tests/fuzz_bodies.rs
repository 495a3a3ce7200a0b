//! The fuzz targets of `fuzz/` on stable Rust: the same bodies, fed by proptest.
//! Bytes that once broke one are to be kept here as a test of their own.

#![allow(clippy::indexing_slicing, clippy::expect_used, clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

#[path = "../fuzz/src/lib.rs"]
mod bodies;

fn bytes(longest: usize) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..longest)
}

/// A virtio header and a frame: random bytes would hardly get past the first check.
fn likely_super_frame() -> impl Strategy<Value = Vec<u8>> {
    let header = (
        prop_oneof![3 => Just(1_u8), 1 => any::<u8>()],
        prop_oneof![Just(0_u8), Just(1), Just(4), Just(5), Just(0x81), any::<u8>()],
        0..200_u16,
        prop_oneof![Just(34_u16), Just(38), Just(54), 0..120_u16, any::<u16>()],
        prop_oneof![Just(16_u16), Just(6), any::<u16>()],
    );
    let ethertype = prop_oneof![Just([8_u8, 0]), Just([0x86, 0xdd]), Just([0x81, 0])];
    (header, ethertype, bytes(400)).prop_map(
        |((flags, gso_type, gso_size, csum_start, csum_offset), ethertype, tail)| {
            let header = vlanswitchd::frame::VnetHeader {
                flags,
                gso_type,
                hdr_len: 0,
                gso_size,
                csum_start,
                csum_offset,
            };
            let mut frame = vec![2; 12];
            frame.extend(ethertype);
            let version = if ethertype == [8, 0] { 0x45 } else { 0x60 };
            frame.push(version);
            frame.extend(tail);
            for (offset, mask) in [(20, 0x40), (21, 0)] {
                if let Some(byte) = frame.get_mut(offset).filter(|_| version == 0x45) {
                    *byte &= mask; // not a fragment
                }
            }
            if let Some(protocol) = frame.get_mut(if version == 0x45 { 23 } else { 20 }) {
                *protocol = [4, 6, 17, 41, 47, 43][usize::from(*protocol) % 6];
            }
            [&header.to_bytes()[..], &frame].concat()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn tag_stack(head in bytes(16), tags in prop::collection::vec(0..5_usize, 0..5), tail in bytes(8)) {
        bodies::tag_stack(&head);
        let mut data = head;
        data.resize(15, 7);
        for tag in tags {
            data.extend([[0x81, 0], [0x88, 0xa8], [0x91, 0], [0x92, 0], [8, 0]][tag]);
            data.extend([1, 2]);
        }
        data.extend(tail);
        bodies::tag_stack(&data);
    }

    #[test]
    fn configuration(noise in bytes(200), keys in prop::collection::vec((0..17_usize, 0..21_usize), 0..8)) {
        bodies::configuration(&noise);
        let mut text = "[[port]]\nvlan = 5\ndevice = 't'\n".to_owned();
        for (key, value) in keys {
            let key = [
                "mode", "native", "tpid", "inner-tpid", "pcp", "create", "owner", "group", "queues",
                "offload", "rate", "burst", "storm", "mac", "[[port]]\nvlan = 7\n#", "[[port]]\nvlan = '5.6'\n#", "vlan",
            ][key];
            let value = [
                "'trunk'", "5", "0x88a8", "'copy'", "false", "0", "'root'", "'off'", "true", "1.5",
                "'access'", "'a,b'", "\"\\n\"", "-1", "'5-9'", "'internal:x'", "[",
                "'1.5G'", "90000", "'52:54:00:12:34:56'", "'02:00:00:00:00:01+02:00:00:00:00:02'",
            ][value];
            text += &format!("{key} = {value}\n");
        }
        bodies::configuration(text.as_bytes());
    }

    #[test]
    fn capture_filter(codes in prop::collection::vec((0..47_usize, any::<[u8; 2]>(), 0..70_u32), 0..12), frame in bytes(80)) {
        const CODES: [u8; 47] = [
            0x20, 0x28, 0x30, 0x40, 0x48, 0x50, 0x80, 0x81, 0x00, 0x01, 0x60, 0x61, 0xb1, 0x02, 0x03, 0x84,
            0x05, 0x15, 0x1d, 0x25, 0x2d, 0x35, 0x3d, 0x45, 0x4d, 0x04, 0x0c, 0x14, 0x1c, 0x24, 0x2c, 0x34,
            0x3c, 0x54, 0x5c, 0x64, 0x6c, 0x74, 0x7c, 0x94, 0x9c, 0xa4, 0xac, 0x07, 0x87, 0x16, 0x06,
        ];
        let mut data = vec![codes.len() as u8 + 1];
        for (code, [jump_true, jump_false], k) in codes {
            data.extend([CODES[code], 0, jump_true % 4, jump_false % 4]);
            data.extend(k.to_le_bytes());
        }
        data.extend([6, 0, 0, 0, 255, 255, 0, 0]);
        data.extend(frame);
        bodies::capture_filter(&data);
    }

    #[test]
    fn control_call(noise in bytes(200), method in 0..8_usize, text in ".{0,30}") {
        bodies::control_call(&noise);
        let method = ["org.vlanswitchd.AddPort", "org.vlanswitchd.Capture", "org.vlanswitchd.HandOver",
            "org.varlink.service.GetInfo", "GetInfo", "org.vlanswitchd.Monitor", "org.vlanswitchd.ReloadConfig", "."][method];
        let call = format!(r#"{{"method":"{method}","parameters":{{"map":{text:?},"format":1}},"more":true}}"#);
        bodies::control_call(call.as_bytes());
    }

    #[test]
    fn check_offload(noise in bytes(200), data in likely_super_frame()) {
        bodies::check_offload(&noise);
        bodies::check_offload(&data);
    }

    #[test]
    fn segment(noise in bytes(200), data in likely_super_frame()) {
        bodies::segment(&noise);
        bodies::segment(&data);
    }

    #[test]
    fn segment_recipe(data in bytes(120)) {
        bodies::segment_recipe(&data);
    }
}

/// What fuzzing has found worth keeping, on whatever compiler the tests run.
#[test]
fn the_kept_corpus() {
    type Body = fn(&[u8]);
    let bodies: [(&str, Body); 7] = [
        ("capture_filter", bodies::capture_filter),
        ("check_offload", bodies::check_offload),
        ("configuration", bodies::configuration),
        ("control_call", bodies::control_call),
        ("segment", bodies::segment),
        ("segment_recipe", bodies::segment_recipe),
        ("tag_stack", bodies::tag_stack),
    ];
    let targets = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/fuzz_targets"));
    assert_eq!(targets.expect("the targets").count(), bodies.len());
    for (name, body) in bodies {
        let folder = format!("{}/fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
        let mut inputs = 0;
        for entry in std::fs::read_dir(&folder).expect("a corpus for each target") {
            body(&std::fs::read(entry.expect("readable").path()).expect("readable"));
            inputs += 1;
        }
        assert!(inputs > 0, "{folder} is empty");
    }
}
