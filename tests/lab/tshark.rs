//! tshark, the independent reader of captures.

use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

/// A frame as tshark reads it: interface, direction (1 in, 2 out), comment, length
/// on the wire, and its bytes in hexadecimal.
pub type Seen = (String, String, String, usize, String);

/// The frames of a file, whose times must be of this minute and rise.
pub fn tshark(file: &Path) -> Vec<Seen> {
    let run = |arguments: &[&str]| {
        let output = Command::new("tshark").arg("-nr").arg(file).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let fields = run(&[
        "-Tfields",
        "-Eseparator=|",
        "-eframe.interface_name",
        "-eframe.packet_flags_direction",
        "-eframe.comment",
        "-eframe.len",
        "-eframe.time_epoch",
    ]);
    let json: serde_json::Value = serde_json::from_str(&run(&["-Tjsonraw"])).unwrap();
    let mut last = 0.0;
    let epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    fields
        .lines()
        .zip(json.as_array().unwrap())
        .map(|(line, json)| {
            let [interface, direction, comment, length, time] =
                line.split('|').map(str::to_owned).collect::<Vec<_>>().try_into().unwrap();
            let time: f64 = time.parse().unwrap();
            assert!(time >= last && (epoch - time).abs() < 60.0, "{time} after {last}");
            last = time;
            let direction = direction.trim_start_matches("0x0000000").to_owned();
            let bytes = json["_source"]["layers"]["frame_raw"][0].as_str().unwrap().to_owned();
            (interface, direction, comment, length.parse().unwrap(), bytes)
        })
        .collect()
}

/// Bytes as tshark writes them.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
