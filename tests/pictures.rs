//! The pictures in docs/concepts.md are drawn here, from the tables the switch decides
//! by and the edit it makes: a picture that is not true any more fails the test.
//! `DRAW_PICTURES=1 cargo test --test pictures` draws them anew.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

use clap::Parser;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use vlanswitchd::control::cli::{Arguments, Config};
use vlanswitchd::frame::edit::HEADROOM;
use vlanswitchd::frame::{FrameBuffer, Pcp, Tag, TagEdit, TagStack, Tci, Tpid, Vid};
use vlanswitchd::switch::{GuestVerdict, Table, UplinkVerdict};

/// What one picture shows.
struct Picture {
    file: &'static str,
    map: &'static str,
    /// VLANs that are drawn in the colour of the port's own.
    own: &'static [u16],
    from_wire: &'static [(&'static str, &'static [Shown])],
    from_guest: &'static [(&'static str, &'static [Shown])],
}

/// A tag: TPID, VID, PCP.
type Shown = (Tpid, u16, u8);

const C: Tpid = Tpid::Customer;
const S: Tpid = Tpid::Service;
const UNTAGGED: &[Shown] = &[];
const PRIORITY: &[Shown] = &[(C, 0, 5)];

const PICTURES: [Picture; 4] = [
    Picture {
        file: "mode-tunnel.svg",
        map: "101=tap-web1",
        own: &[101],
        from_wire: &[
            ("VLAN 101", &[(C, 101, 0)]),
            ("a tag of the guest's own inside", &[(C, 101, 0), (C, 7, 0)]),
            ("another VLAN", &[(C, 102, 0)]),
        ],
        from_guest: &[
            ("untagged", UNTAGGED),
            ("priority-tagged", PRIORITY),
            ("tagged by the guest", &[(C, 7, 0)]),
        ],
    },
    Picture {
        file: "mode-access.svg",
        map: "101=tap-web1,mode=access",
        own: &[101],
        from_wire: &[
            ("VLAN 101", &[(C, 101, 0)]),
            ("another tag inside", &[(C, 101, 0), (C, 7, 0)]),
        ],
        from_guest: &[
            ("untagged", UNTAGGED),
            ("priority-tagged", PRIORITY),
            ("tagged by the guest", &[(C, 101, 0)]),
        ],
    },
    Picture {
        file: "mode-trunk.svg",
        map: "101-103=tap-fw,native=101",
        own: &[101, 102, 103],
        from_wire: &[
            ("a VLAN of the list", &[(C, 102, 3)]),
            ("the native VLAN", &[(C, 101, 0)]),
            ("a VLAN that is not in the list", &[(C, 104, 0)]),
        ],
        from_guest: &[
            ("untagged", UNTAGGED),
            ("priority-tagged", PRIORITY),
            ("a VLAN of the list", &[(C, 102, 3)]),
            ("a VLAN that is not in the list", &[(C, 104, 0)]),
        ],
    },
    Picture {
        file: "mode-pair.svg",
        map: "101.20=tap-q,tpid=0x88a8",
        own: &[101, 20],
        from_wire: &[
            ("the pair 101.20", &[(S, 101, 0), (C, 20, 0)]),
            ("another inner tag", &[(S, 101, 0), (C, 21, 0)]),
        ],
        from_guest: &[("untagged", UNTAGGED), ("tagged by the guest", &[(C, 7, 0)])],
    },
];

/// How a frame ends.
enum End {
    Arrives(Vec<Shown>),
    Dropped(&'static str),
    /// Nobody claims it.
    Host,
}

fn table(map: &str) -> Table {
    let words = ["vlanswitchd", "--uplink", "eth0", "--map", map];
    Config::try_from(Arguments::try_parse_from(words).unwrap()).unwrap().table
}

fn frame(tags: &[Shown]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x54, 0, 0, 1, 1, 0x52, 0x54, 0, 0, 1, 2];
    for (tpid, vid, pcp) in tags {
        let tci = Tci::new(Vid::new(*vid).unwrap(), Pcp::new(*pcp).unwrap());
        frame.extend(Tag { tpid: *tpid, tci }.to_bytes());
    }
    frame.extend([0x08, 0x00, 0x45]);
    frame
}

fn tags_of(frame: &[u8]) -> Vec<Shown> {
    let stack = TagStack::read(None, frame).unwrap();
    let shown = |tag: Tag| (tag.tpid, tag.tci.vid_bits(), (tag.tci.0 >> 13) as u8);
    (0..3).map_while(|depth| stack.get(depth).map(shown)).collect()
}

/// The frame after the edit the switch would make.
fn edited(frame: &[u8], edit: &TagEdit) -> Vec<Shown> {
    let mut space = vec![0; HEADROOM];
    space.extend(frame);
    let mut buffer = FrameBuffer::new(&mut space, HEADROOM).unwrap();
    buffer.apply(edit, None).unwrap();
    tags_of(buffer.frame())
}

fn to_guest(table: &Table, tags: &[Shown]) -> End {
    let frame = frame(tags);
    match table.decide_from_uplink(&TagStack::read(None, &frame).unwrap()) {
        UplinkVerdict::Forward { edit, .. } => End::Arrives(edited(&frame, &edit)),
        UplinkVerdict::Drop { reason, .. } => End::Dropped(reason.name()),
        UplinkVerdict::Unmapped => End::Host,
    }
}

fn to_wire(table: &Table, tags: &[Shown]) -> End {
    let frame = frame(tags);
    match table.decide_from_guest(0, &TagStack::read(None, &frame).unwrap()) {
        GuestVerdict::Forward(edit) => End::Arrives(edited(&frame, &edit)),
        GuestVerdict::Drop(reason) => End::Dropped(reason.name()),
    }
}

const WIDTH: u32 = 820;
const ROW: u32 = 58;
/// Left edges of what is on the wire, of the arrow, and of what is at the guest.
const WIRE: u32 = 24;
const ARROW: u32 = 332;
const GUEST: u32 = 512;

/// A frame as boxes; the tag's colour says whose it is.
fn draw_frame(svg: &mut String, x: u32, y: u32, tags: &[Shown], own: &[u16]) {
    let mut left = x;
    let mut part = |width: u32, class: &str, lines: &[String]| {
        write_box(svg, left, y, width, class, lines);
        left += width;
    };
    part(74, "mac", &["addresses".to_owned()]);
    for (tpid, vid, pcp) in tags {
        let class = match vid {
            0 => "priority",
            vid if own.contains(vid) => "own",
            _ => "guests",
        };
        let value = if *pcp == 0 { format!("{vid}") } else { format!("{vid}, PCP {pcp}") };
        part(70, class, &[tpid.to_string(), value]);
    }
    part(54, "data", &["data".to_owned()]);
}

fn draw_row(
    svg: &mut String,
    y: u32,
    words: &str,
    sent: &[Shown],
    end: &End,
    own: &[u16],
    right: bool,
) {
    let (source, target) = if right { (WIRE, GUEST) } else { (GUEST, WIRE) };
    writeln!(svg, r#"<text x="{source}" y="{}" class="note">{words}</text>"#, y + 11).unwrap();
    draw_frame(svg, source, y + 16, sent, own);
    let middle = y + 32;
    let (from, to) = (ARROW, ARROW + 156);
    let (tail, head) = if right { (from, to) } else { (to, from) };
    let class = if matches!(end, End::Arrives(_)) { "arrow" } else { "arrow lost" };
    let point = |away: u32| if right { head - away } else { head + away };
    match end {
        End::Arrives(tags) => {
            writeln!(svg, r#"<path d="M{tail} {middle}H{}" class="{class}"/>"#, point(8)).unwrap();
            writeln!(
                svg,
                r#"<path d="M{head} {middle}L{0} {1}V{2}z" class="head"/>"#,
                point(9),
                middle - 5,
                middle + 5
            )
            .unwrap();
            draw_frame(svg, target, y + 16, tags, own);
        }
        End::Dropped(_) | End::Host => {
            let words = match end {
                End::Dropped(reason) => format!("dropped: {reason}"),
                _ => "left to the host".to_owned(),
            };
            let stop = ARROW + 78;
            writeln!(svg, r#"<path d="M{tail} {middle}H{stop}" class="{class}"/>"#).unwrap();
            writeln!(
                svg,
                r#"<path d="M{0} {2}L{1} {3}M{0} {3}L{1} {2}" class="cross"/>"#,
                stop - 6,
                stop + 6,
                middle - 6,
                middle + 6
            )
            .unwrap();
            let x = if right { target } else { target + 8 };
            writeln!(svg, r#"<text x="{x}" y="{}" class="why">{words}</text>"#, middle + 4)
                .unwrap();
        }
    }
}

fn draw(picture: &Picture) -> String {
    let table = table(picture.map);
    let rows = picture.from_wire.len() + picture.from_guest.len();
    let height = 132 + ROW * rows as u32;
    let mut svg = String::new();
    writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">
<title>What --map {map} does to frames</title>
<style>
text {{ font: 12px "DejaVu Sans", Verdana, sans-serif; fill: #24292f }}
.map {{ font: bold 14px "DejaVu Sans Mono", Consolas, monospace }}
.place {{ font-weight: bold }}
.in {{ font-size: 11px; text-anchor: middle }}
.note {{ fill: #57606a; font-size: 11px }}
.why {{ fill: #b42318; font-family: "DejaVu Sans Mono", Consolas, monospace }}
.host {{ fill: #57606a }}
rect {{ stroke: #57606a }}
.page {{ fill: #ffffff; stroke: #d0d7de }}
.mac, .data {{ fill: #eaeef2 }}
.own {{ fill: #a5d0ff }}
.guests {{ fill: #ffd8a8 }}
.priority {{ fill: #d8c6f5 }}
.arrow {{ stroke: #1a7f37; stroke-width: 2; fill: none }}
.head {{ fill: #1a7f37 }}
.lost {{ stroke: #b42318; stroke-dasharray: 5 4 }}
.cross {{ stroke: #b42318; stroke-width: 3 }}
</style>
<rect x="0.5" y="0.5" width="{w}" height="{h}" rx="8" class="page"/>
<text x="{WIRE}" y="28" class="map">--map {map}</text>
<text x="{WIRE}" y="54" class="place">on the wire</text>
<text x="{GUEST}" y="54" class="place">at the guest</text>"##,
        map = picture.map,
        w = WIDTH - 1,
        h = height - 1,
    )
    .unwrap();
    let mut y = 66;
    for (words, tags) in picture.from_wire {
        draw_row(&mut svg, y, words, tags, &to_guest(&table, tags), picture.own, true);
        y += ROW;
    }
    writeln!(svg, r##"<path d="M{WIRE} {0}H{1}" stroke="#d0d7de"/>"##, y + 6, WIDTH - WIRE)
        .unwrap();
    y += 14;
    for (words, tags) in picture.from_guest {
        draw_row(&mut svg, y, words, tags, &to_wire(&table, tags), picture.own, false);
        y += ROW;
    }
    let legend = [
        ("own", "a VLAN of the port"),
        ("guests", "another VLAN"),
        ("priority", "VID 0: priority only"),
    ];
    for (place, (class, words)) in legend.into_iter().enumerate() {
        let x = WIRE + 190 * place as u32;
        writeln!(svg, r#"<rect x="{x}" y="{}" width="14" height="14" class="{class}"/>"#, y + 20)
            .unwrap();
        writeln!(svg, r#"<text x="{}" y="{}" class="note">{words}</text>"#, x + 20, y + 31)
            .unwrap();
    }
    svg.push_str("</svg>\n");
    svg
}

/// Where a frame is on its way, its boxes, and a tag that is kept beside it.
type Station = (&'static str, Vec<Part>, Option<Shown>);

/// A part of a frame: class, width and text.
type Part = (&'static str, u32, Vec<String>);

fn boxes(virtio: bool, tags: &[Shown], fcs: bool) -> Vec<Part> {
    let plain = |class, width, text: &str| (class, width, vec![text.to_owned()]);
    let mut boxes = Vec::new();
    if virtio {
        boxes.push(plain("virtio", 90, "virtio header"));
    }
    boxes.push(plain("mac", 74, "addresses"));
    for (tpid, vid, _) in tags {
        boxes.push(("own", 70, vec![tpid.to_string(), vid.to_string()]));
    }
    boxes.push(plain("data", 54, "data"));
    if fcs {
        boxes.push(plain("data", 40, "FCS"));
    }
    boxes
}

/// A frame at each point of its way through `--map 101=tap-web1`, both ways.
fn draw_way() -> String {
    let table = table("101=tap-web1");
    let tagged: &[Shown] = &[(C, 101, 0)];
    let End::Arrives(at_guest) = to_guest(&table, tagged) else { panic!("it arrives") };
    let End::Arrives(on_wire) = to_wire(&table, UNTAGGED) else { panic!("it arrives") };
    let stations: [(&str, Vec<Station>); 2] = [
        (
            "from the wire to the guest",
            vec![
                ("on the wire", boxes(false, tagged, true), None),
                (
                    "in the uplink's ring: the kernel has taken the tag out",
                    boxes(false, UNTAGGED, false),
                    tagged.first().copied(),
                ),
                (
                    "in the same slot, edited: what vlanswitchd sends",
                    boxes(true, &at_guest, false),
                    None,
                ),
                ("in the queue of tap-web1", boxes(false, &at_guest, false), None),
                ("read by QEMU or vhost, for the guest", boxes(true, &at_guest, false), None),
            ],
        ),
        (
            "from the guest to the wire",
            vec![
                ("written by QEMU or vhost", boxes(true, UNTAGGED, false), None),
                (
                    "in the ring of tap-web1; the seal drops the host's copy",
                    boxes(false, UNTAGGED, false),
                    None,
                ),
                (
                    "in the same slot, edited: what vlanswitchd sends",
                    boxes(true, &on_wire, false),
                    None,
                ),
                ("on the wire", boxes(false, &on_wire, true), None),
            ],
        ),
    ];
    let rows: usize = stations.iter().map(|(_, rows)| rows.len()).sum();
    let height = 40 * rows as u32 + 118;
    let mut svg = String::new();
    writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">
<title>A frame at each point of its way</title>
<style>
text {{ font: 12px "DejaVu Sans", Verdana, sans-serif; fill: #24292f }}
.place {{ font-weight: bold }}
.in {{ font-size: 11px; text-anchor: middle }}
.note {{ fill: #57606a; font-size: 11px }}
rect {{ stroke: #57606a }}
.page {{ fill: #ffffff; stroke: #d0d7de }}
.mac, .data {{ fill: #eaeef2 }}
.own {{ fill: #a5d0ff }}
.virtio {{ fill: #d3f0da }}
.aside {{ stroke-dasharray: 4 3 }}
.down {{ stroke: #1a7f37; stroke-width: 2 }}
</style>
<rect x="0.5" y="0.5" width="{w}" height="{h}" rx="8" class="page"/>"##,
        w = WIDTH - 1,
        h = height - 1,
    )
    .unwrap();
    let mut y = 14;
    for (heading, stations) in stations {
        writeln!(svg, r#"<text x="{WIRE}" y="{}" class="place">{heading}</text>"#, y + 14).unwrap();
        y += 26;
        let last = stations.len() - 1;
        for (number, (words, parts, beside)) in stations.into_iter().enumerate() {
            writeln!(svg, r#"<text x="{WIRE}" y="{}">{words}</text>"#, y + 20).unwrap();
            let mut left = 440;
            for (class, width, lines) in parts {
                write_box(&mut svg, left, y, width, class, &lines);
                left += width;
            }
            if let Some((tpid, vid, _)) = beside {
                write_box(
                    &mut svg,
                    left + 24,
                    y,
                    70,
                    "own aside",
                    &[tpid.to_string(), vid.to_string()],
                );
                writeln!(
                    svg,
                    r#"<text x="{}" y="{}" class="note">beside it</text>"#,
                    left + 102,
                    y + 20
                )
                .unwrap();
            }
            if number < last {
                writeln!(
                    svg,
                    r#"<path d="M424 {}v24m-4 -6l4 6l4 -6" class="down" fill="none"/>"#,
                    y + 24
                )
                .unwrap();
            }
            y += 40;
        }
        y += 20;
    }
    svg.push_str("</svg>\n");
    svg
}

fn write_box(svg: &mut String, x: u32, y: u32, width: u32, class: &str, lines: &[String]) {
    writeln!(svg, r#"<rect x="{x}" y="{y}" width="{width}" height="32" class="{class}"/>"#)
        .unwrap();
    for (line, text) in lines.iter().enumerate() {
        let base = if lines.len() == 1 { y + 20 } else { y + 14 + 13 * line as u32 };
        writeln!(svg, r#"<text x="{}" y="{base}" class="in">{text}</text>"#, x + width / 2)
            .unwrap();
    }
}

#[test]
fn the_pictures_show_what_the_switch_does() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let folder = docs.join("images");
    let anew = std::env::var_os("DRAW_PICTURES").is_some();
    let concepts = fs::read_to_string(docs.join("concepts.md")).unwrap();
    let mut pictures: Vec<(&str, String)> =
        PICTURES.iter().map(|picture| (picture.file, draw(picture))).collect();
    pictures.push(("way.svg", draw_way()));
    for (file, drawn) in pictures {
        let path = folder.join(file);
        if anew {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&path, &drawn).unwrap();
        }
        let there = fs::read_to_string(&path).unwrap_or_default();
        assert!(there == drawn, "{}: draw it anew: DRAW_PICTURES=1", path.display());
        assert!(concepts.contains(&format!("images/{file}")), "{file}");
    }
}
