//! Every command in the documents is run, in the order of its page, on a host of its own:
//! namespaces, with vlanswitchd forwarding (`docs_live/prelude.sh`). What cannot be run
//! here is in a list with the reason; a line that is neither fails the test.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::Lab;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use tempfile::TempDir;

/// Commands that are not run here, by how they begin, and why.
const ELSEWHERE: [(&str, &str); 18] = [
    ("apt install", "tests/packages installs the package"),
    ("dnf install", "no such system here"),
    ("apparmor_parser", "tests/packages has it read the profile"),
    ("scripts/package", "tests/packages begins with it"),
    ("scripts/check", "its parts are suites of scripts/test"),
    ("scripts/test", "it runs this"),
    ("scripts/macvtap-vs-vlanswitchd", "the suite vms runs what it runs"),
    ("cargo build", "it has built this"),
    ("cargo test", "it runs this"),
    ("cargo bench", "takes hours, and an idle machine"),
    ("qemu-system-x86_64", "the suite vms runs QEMU"),
    // What programs print.
    ("forwarding: ", "output"),
    ("tap-web1: ", "output"),
    ("guest ", "a picture"),
    ("stack ", "a picture"),
    ("{\"", "output"),
    ("web1", "output"),
    ("uplink", "output"),
];

/// Programs whose lines are run as they are.
const PROGRAMS: [&str; 16] = [
    "vlanswitchd",
    "vlanswitchctl",
    "ip",
    "curl",
    "virsh",
    "install",
    "mkdir",
    "cp",
    "systemctl",
    "setcap",
    "printf",
    "docker",
    "nsenter",
    "scripts/demo",
    "scripts/macvtap-to-vlanswitchd",
    "chmod",
];

/// What a machine with two processors and few accounts lacks.
const REPLACED: [(&str, &str); 4] = [
    ("--cpus 2-5", "--cpus 0"),
    ("--cpus 2", "--cpus 0"),
    ("owner=qemu-user", "owner=0"),
    ("-c 100", "-c 1"),
];

/// Commands that go on until somebody ends them.
const ENDLESS: [&str; 4] = [
    "vlanswitchctl monitor",
    "vlanswitchctl top",
    "vlanswitchctl stats --watch",
    "vlanswitchctl capture",
];

enum Piece {
    Line(String),
    /// A fenced block for a shell, whole.
    Script(String),
}

/// The commands of a page, and what looks like one.
fn pieces(text: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut lines = text.lines().peekable();
    let mut skip_next = false;
    while let Some(line) = lines.next() {
        if let Some(language) = line.strip_prefix("```") {
            let body: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            if language == "sh" && !skip_next {
                pieces.push(Piece::Script(body.join("\n")));
            }
            skip_next = false;
        } else if line.starts_with("<!-- not run here: ") {
            skip_next = true;
        } else if let Some(command) =
            line.strip_prefix("    ").filter(|line| !line.starts_with(' '))
        {
            let mut command = command.to_owned();
            while command.ends_with('\\') || command.ends_with('|') {
                let next = lines.next().expect("a command goes on");
                command = format!("{} {}", command.trim_end_matches('\\').trim_end(), next.trim());
            }
            pieces.push(Piece::Line(command));
        }
    }
    pieces
}

/// The shell's words for one command of a page.
fn step(page: &str, command: &str) -> String {
    let shown = command.replace('\'', "'\\''");
    let mut command = command.strip_prefix("$ ").unwrap_or(command).to_owned();
    for (from, to) in REPLACED {
        command = command.replace(from, to);
    }
    let bare = command.strip_prefix("sudo ").unwrap_or(&command);
    let mut script = format!("step='{page}: {shown}'\n");
    let stays = bare.starts_with("vlanswitchd ")
        && !["--check", "--version", "--give-back"].iter().any(|option| bare.contains(option));
    let body = if stays {
        let arguments = bare.strip_prefix("vlanswitchd").unwrap();
        let with = if bare.contains("--config") { "daemon" } else { "without_file daemon" };
        format!("{with} {arguments}")
    } else if bare.contains("--give-back") {
        format!("stop; without_file {bare} >out.log 2>&1; daemon --config \"$file\"")
    } else if bare.starts_with("vlanswitchd --uplink") && !bare.contains("--config") {
        format!("without_file {bare} >out.log 2>&1")
    } else if let Some(device) = bare.strip_prefix("ip link delete ") {
        format!("there {device}; {command} || fail \"status $?\"")
    } else if let Some(endless) = ENDLESS.iter().find(|endless| bare.starts_with(**endless)) {
        let rest = bare.strip_prefix(endless).unwrap();
        let program = match *endless {
            // It needs a terminal.
            "vlanswitchctl top" => "script -qec 'vlanswitchctl top' /dev/null".to_owned(),
            other => other.to_owned(),
        };
        format!(
            "{{ timeout -s INT 1 {program} {rest}; }} >out.log 2>&1 || [ $? = 124 ] || fail \"status $?\""
        )
    } else if bare.starts_with("vlanswitchctl doctor") {
        // It may find something on this host.
        format!("{{ {command}; }} >out.log 2>&1 || [ $? = 1 ] || fail \"status $?\"")
    } else if command.contains('>') {
        format!("{{ {command}; }} 2>out.log || fail \"status $?\"")
    } else {
        format!("{{ {command}; }} >out.log 2>&1 || fail \"status $?\"")
    };
    writeln!(script, "echo \"$step\"\n{body}").unwrap();
    script
}

fn begins(command: &str, start: &str) -> bool {
    let command = command.strip_prefix("$ ").unwrap_or(command);
    command.strip_prefix("sudo ").unwrap_or(command).starts_with(start)
}

fn is_elsewhere(command: &str) -> bool {
    ELSEWHERE.iter().any(|(start, _)| begins(command, start))
}

/// The page as a script for the shell, and how many commands it has.
fn script(page: &str, text: &str) -> (String, usize) {
    let mut script = String::new();
    let mut count = 0;
    for piece in pieces(text) {
        match piece {
            Piece::Script(body) if body.lines().all(is_elsewhere) => {}
            Piece::Script(body) => {
                // Its lines share variables.
                let shown = body.lines().next().unwrap_or_default().replace('\'', "'\\''");
                writeln!(script, "step='{page}: {shown}...'\necho \"$step\"").unwrap();
                writeln!(script, "( set -e\n{body}\n) >out.log 2>&1 || fail \"status $?\"")
                    .unwrap();
                count += body.lines().count();
            }
            Piece::Line(command) => {
                // Half a minute, and the README's page has it.
                let again = begins(&command, "scripts/demo") && page != "README.md";
                if again || is_elsewhere(&command) {
                    continue;
                }
                let known = PROGRAMS.iter().any(|program| {
                    begins(&command, &format!("{program} "))
                        || begins(&format!("{command} "), &format!("{program} "))
                });
                assert!(known, "{page}: neither a command nor known output: {command}");
                script.push_str(&step(page, &command));
                count += 1;
            }
        }
    }
    (script, count)
}

fn run(page: &str, setting: &str) -> usize {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (commands, count) = script(page, &fs::read_to_string(root.join(page)).unwrap());
    if count == 0 {
        return 0;
    }
    let lab = Lab::new();
    lab.host.ip("link set up0 down");
    lab.host.ip("link set up0 name eth0");
    lab.host.ip("link set eth0 up");
    let folder = TempDir::new().unwrap();
    let prelude = include_str!("docs_live/prelude.sh");
    let whole = format!("{prelude}\n{commands}\nstep=end\nstop\necho 'the end'\n");
    let programs = Path::new(env!("CARGO_BIN_EXE_vlanswitchd")).parent().unwrap();
    let isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let mut command = lab.host.command_through(&isolated, "sh");
    command.args(["-c", &whole, "sh"]).arg(folder.path()).arg(root).arg(programs).arg(setting);
    let output = command.stdin(Stdio::null()).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.ends_with("the end\n"),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    count
}

/// Pages that are one test each, with what they begin with.
macro_rules! pages {
    ($($name:ident: $page:literal, $setting:literal;)*) => {
        const PAGES: &[&str] = &[$($page),*];
        $(
            #[test]
            #[ignore = "needs root: makes network namespaces"]
            fn $name() {
                println!("{} commands", run($page, $setting));
            }
        )*
    };
}

pages! {
    readme: "README.md", "a-port";
    contributing: "CONTRIBUTING.md", "a-port";
    comparison: "docs/comparison.md", "a-port";
    configuration: "docs/configuration.md", "a-port";
    containers: "docs/containers.md", "a-port";
    control: "docs/control.md", "a-port";
    kernel_path: "docs/kernel-path.md", "a-port";
    libvirt: "docs/libvirt.md", "a-port";
    metrics: "docs/metrics.md", "a-port";
    migration: "docs/migration.md", "no-ports";
    operations: "docs/operations.md", "a-port";
    performance: "docs/performance.md", "a-port";
    quick_start: "docs/quick-start.md", "a-port";
    scaling: "docs/scaling.md", "a-port";
    security: "docs/security.md", "a-port";
    service: "docs/service.md", "a-port";
    troubleshooting: "docs/troubleshooting.md", "a-port";
    tuning: "docs/tuning.md", "a-port";
    upgrading: "docs/upgrading.md", "a-port";
}

/// A page that is not in the list has no commands.
#[test]
fn every_page_with_commands_is_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = vec!["README.md".to_owned(), "CONTRIBUTING.md".to_owned()];
    for entry in fs::read_dir(root.join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") {
            found.push(format!("docs/{name}"));
        }
    }
    let mut total = 0;
    for page in found {
        let (_, count) = script(&page, &fs::read_to_string(root.join(&page)).unwrap());
        assert!(count == 0 || PAGES.contains(&page.as_str()), "{page} is not run");
        total += count;
    }
    assert!(total > 60, "only {total} commands found");
}
