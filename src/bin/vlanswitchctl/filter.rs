//! Filters of captures: tcpdump's language, compiled by tcpdump.

use std::process::{Command, Stdio};

/// The program for `expression` as the control interface takes it: decimal, with
/// commas. An expression in that form already stays as it is.
///
/// # Errors
/// What tcpdump says of it, or that there is no tcpdump.
pub fn compile(expression: &str) -> Result<String, String> {
    if is_compiled(expression) {
        return Ok(expression.to_owned());
    }
    // EN10MB: the frames are Ethernet's, whatever device tcpdump would look at.
    let output = Command::new("tcpdump")
        .args(["-ddd", "-y", "EN10MB", "--", expression])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            format!(
                "--filter needs tcpdump to compile it, which does not start: {error}; install it, \
                 or give the program that `tcpdump -ddd` prints, with commas for line ends"
            )
        })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().trim_start_matches("tcpdump: ");
        return Err(format!("--filter '{expression}': {said}; see pcap-filter(7)"));
    }
    let program = String::from_utf8_lossy(&output.stdout);
    Ok(program.trim().lines().collect::<Vec<_>>().join(","))
}

fn is_compiled(expression: &str) -> bool {
    expression.contains(',')
        && expression.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b' ' | b','))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
    use super::*;

    #[test]
    fn a_compiled_filter_stays() {
        assert_eq!(compile("1,6 0 0 262144").unwrap(), "1,6 0 0 262144");
    }

    #[test]
    #[ignore = "needs tcpdump"]
    fn tcpdump_compiles() {
        let program = compile("vlan 101 and icmp6").unwrap();
        let lines: Vec<_> = program.split(',').collect();
        assert_eq!(lines.len(), lines[0].parse::<usize>().unwrap() + 1);
        let error = compile("vlan and and").unwrap_err();
        assert!(error.contains("syntax error") && !error.contains("tcpdump:"), "{error}");
        assert!(compile("-w /tmp/x").is_err(), "an expression is never an option");
    }
}
