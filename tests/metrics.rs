//! Metrics as Prometheus reads them: by a real scrape over TCP and a unix socket,
//! checked by promtool and taken in by Prometheus itself; and what the documents and
//! the dashboard say of them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{Frame, tag};
use lab::{Daemon, Lab, eventually};
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use vlanswitchd::control::metrics::METRICS;

const PORT: &str = "127.0.0.1:9751";

fn repository(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_table_in_the_documents_is_the_codes() {
    let documented: Vec<String> = repository("docs/metrics.md")
        .lines()
        .filter(|line| line.starts_with("| `vlanswitchd_"))
        .map(str::to_owned)
        .collect();
    let coded: Vec<String> = METRICS
        .iter()
        .map(|metric| {
            let labels: Vec<String> =
                metric.labels.iter().map(|label| format!("`{label}`")).collect();
            let (name, kind) = (metric.name(), metric.kind.name());
            format!("| `{name}` | {kind} | {} | {} |", labels.join(", "), metric.help)
        })
        .collect();
    lab::assert_same(&documented.join("\n"), &coded.join("\n"));
}

/// Names of metrics in a text.
fn names_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|char: char| !char.is_ascii_alphanumeric() && char != '_');
    words.filter(|word| word.starts_with("vlanswitchd_")).map(str::to_owned).collect()
}

/// Every string under a key, anywhere in a JSON document.
fn strings_of(value: &serde_json::Value, key: &str, found: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                match value.as_str() {
                    Some(text) if name == key => found.push(text.to_owned()),
                    _ => strings_of(value, key, found),
                }
            }
        }
        serde_json::Value::Array(values) => {
            values.iter().for_each(|value| strings_of(value, key, found));
        }
        _ => {}
    }
}

#[test]
fn the_dashboard_asks_only_for_metrics_there_are() {
    let dashboard: serde_json::Value =
        serde_json::from_str(&repository("dist/grafana-dashboard.json")).unwrap();
    let (mut queries, mut variables) = (Vec::new(), Vec::new());
    strings_of(&dashboard["panels"], "expr", &mut queries);
    strings_of(&dashboard["templating"], "query", &mut variables);
    assert!(queries.len() >= 8, "{queries:?}");
    let known: BTreeSet<String> =
        METRICS.iter().map(vlanswitchd::control::metrics::Metric::name).collect();
    for query in queries.iter().chain(&variables).filter(|query| *query != "prometheus") {
        let names = names_in(query);
        assert!(!names.is_empty(), "{query} asks for nothing of ours");
        let unknown: Vec<_> = names.difference(&known).collect();
        assert!(unknown.is_empty(), "{query}: {unknown:?}");
    }
    // Every label it filters or groups by is one of that metric.
    for query in &queries {
        assert!(query.contains(r#"instance=~"$instance""#), "{query}");
        if names_in(query).iter().any(|name| name.starts_with("vlanswitchd_port_")) {
            assert!(query.contains(r#"port=~"$port""#), "{query}");
        }
    }
    let named: Vec<&str> = dashboard["templating"]["list"]
        .as_array()
        .unwrap()
        .iter()
        .map(|variable| variable["name"].as_str().unwrap())
        .collect();
    assert!(named.contains(&"instance") && named.contains(&"port"), "{named:?}");
}

/// What came back for these bytes, until the other end closed.
fn ask(mut stream: impl Read + Write, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    // Closed with bytes of ours unread: a reset after the answer.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

fn tcp(lab: &Lab) -> TcpStream {
    lab.host.enter(|| TcpStream::connect(PORT)).unwrap()
}

fn scrape(lab: &Lab, accept: &str) -> (String, String) {
    let request = format!("GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n");
    let answer = ask(tcp(lab), &request);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    (head.to_owned(), body.to_owned())
}

fn value(body: &str, series: &str) -> f64 {
    let line = body.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{body}")).parse().unwrap()
}

fn start(lab: &Lab) -> Daemon {
    lab.daemon(&["--map", "101=tap-m1", "--map", "102=tap-m2,create=no", "--metrics", PORT])
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_scrape_tells_what_was_counted_and_promtool_likes_it() {
    let lab = Lab::new();
    let daemon = start(&lab);
    let guest = lab.raw_guest("tap-m1");
    daemon.attached(&["tap-m1"]);
    let wire = lab.wire();
    for number in 0..10 {
        guest.send(&Frame::numbered(number).reversed());
        wire.send(&Frame::numbered(number).tags(&[tag(0x8100, 101)]));
        wire.send(&Frame::numbered(number).tags(&[tag(0x8100, 777)]));
    }
    guest.receive_until(9);
    daemon.until("the guest's frames are out", |summary| summary.to_wire.out_frames == 10);

    let (head, body) = scrape(&lab, "application/openmetrics-text;version=1.0.0,*/*;q=0.1");
    assert!(head.contains("Content-Type: application/openmetrics-text"), "{head}");
    assert!(body.ends_with("# EOF\n"));
    for direction in ["from_guest", "to_guest"] {
        let flow = format!(r#"{{port="tap-m1",direction="{direction}"}}"#);
        assert_eq!(value(&body, &format!("vlanswitchd_port_in_frames_total{flow}")), 10.0);
        assert_eq!(value(&body, &format!("vlanswitchd_port_out_frames_total{flow}")), 10.0);
    }
    let row = r#"vlanswitchd_unmapped_vlan_frames_total{tpid="0x8100",vid="777"}"#;
    assert_eq!(value(&body, row), 10.0);
    assert_eq!(value(&body, r#"vlanswitchd_port_state{port="tap-m1",state="attached"}"#), 1.0);
    assert_eq!(value(&body, r#"vlanswitchd_port_state{port="tap-m2",state="absent"}"#), 1.0);
    assert_eq!(value(&body, r#"vlanswitchd_uplink_sent_frames_total{device="up0"}"#), 10.0);

    // Prometheus' own linter, which knows the older format.
    let (head, body) = scrape(&lab, "*/*");
    assert!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
    let mut promtool = lab.host.command("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = promtool.stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
    daemon.stop();
}

/// A folder of this test's own, gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vslab-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A program, killed when dropped.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn prometheus_takes_it_in() {
    const SERVER: &str = "127.0.0.1:9752";
    let lab = Lab::new();
    let daemon = start(&lab);
    let folder = Folder::new("prometheus");
    let config = folder.path("prometheus.yml");
    fs::write(
        &config,
        format!(
            "scrape_configs:\n- job_name: vlanswitchd\n  scrape_interval: 1s\n  \
             static_configs:\n  - targets: ['{PORT}']\n"
        ),
    )
    .unwrap();
    let mut command = lab.host.command("prometheus");
    command.args([
        &format!("--config.file={config}"),
        &format!("--storage.tsdb.path={}", folder.path("data")),
        &format!("--web.listen-address={SERVER}"),
    ]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let _prometheus = Running(child.expect("prometheus is installed"));
    let query = |expression: &str| {
        let mut command = lab.host.command("promtool");
        command.args(["query", "instant", &format!("http://{SERVER}"), expression]);
        lab::namespace::run(&mut command).unwrap_or_default().trim().to_owned()
    };
    let found = eventually("Prometheus has scraped", || {
        Some(query("vlanswitchd_port_state == 1")).filter(|text| !text.is_empty())
    });
    assert!(found.contains(r#"port="tap-m2", state="absent""#), "{found}");
    // A series for each, under the name the documents give it, but for those that
    // appear with what they count.
    let dynamic = ["vlanswitchd_unmapped_vlan_frames_total"];
    for metric in METRICS.iter().filter(|metric| !dynamic.contains(&&*metric.name())) {
        assert!(!query(&metric.name()).is_empty(), "{} is not there", metric.name());
    }
    daemon.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn odd_requests_harm_nobody() {
    let lab = Lab::new();
    let daemon = start(&lab);
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("GET /metrics/../etc/passwd HTTP/1.1\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "405"),
        ("\x01\x02\x03\r\n\r\n", "400"),
        ("GET /metrics SPDY/9\r\n\r\n", "400"),
        ("GET /metrics HTTP/1.0\r\n\r\n", "200"),
        ("GET /metrics?name=x HTTP/1.1\r\nHost: y\r\n\r\n", "200"),
    ] {
        let answer = ask(tcp(&lab), request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {answer:.80}");
    }
    // Byte by byte, with others answered in between.
    let mut slow = tcp(&lab);
    for byte in "GET /metrics HTTP/1.1\r\nAccept: */*\r\n\r\n".bytes() {
        slow.write_all(&[byte]).unwrap();
        scrape(&lab, "*/*");
    }
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer:.80}");
    // Headers without end: closed, long before they have all been taken.
    let mut huge = tcp(&lab);
    let line = format!("X: {}\r\n", "x".repeat(8000));
    huge.write_all(b"GET /metrics HTTP/1.1\r\n").unwrap();
    let refused = (0..100_000).find(|_| huge.write_all(line.as_bytes()).is_err());
    assert!(refused.is_some(), "800 MB of headers were taken");
    scrape(&lab, "*/*");
    daemon.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_unix_socket_serves_as_well() {
    let lab = Lab::new();
    let folder = Folder::new("metrics");
    let path = folder.path("socket");
    let daemon = lab.daemon(&["--map", "101=tap-m1", "--metrics", &format!("unix:{path}")]);
    let answer =
        ask(UnixStream::connect(&path).unwrap(), "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer:.80}");
    assert!(answer.contains("\nvlanswitchd_build_info{version="), "{answer}");
    daemon.stop();
    assert!(!fs::exists(&path).unwrap(), "the socket is left behind");
}
