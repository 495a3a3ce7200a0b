//! The words of policing: `rate=`, `burst=`, `storm=`, `mac=`.

use super::bad_value;
use super::build::{Fault, at};
use super::problem::MapProblem;
use super::spec::PortSpec;
use crate::switch::{MACS_MAX, MacAddress, PoliceRule, Rate, Storm};
use arrayvec::ArrayVec;

const RATE_CURE: &str = "write bits a second from 1k to 1T, as a number or with k, M, G or T \
                         behind it (thousands each), such as 100M or 1.5G";
const BURST_CURE: &str = "write bytes from 80k to 1G, as a number or with k, M or G behind it \
                          (thousands each), such as 200k: less would never let a super-frame \
                          of 64 KiB pass";
const STORM_CURE: &str = "write frames a second from 1 to 100M, such as 1000";
const MAC_CURE: &str = "write addresses such as 52:54:00:12:34:56, with + between two";
/// What stands behind a number, and how many zeros that is.
const SUFFIXES: [(char, usize); 4] = [('T', 12), ('G', 9), ('M', 6), ('k', 3)];

/// Understands the four options together.
pub(super) fn rule(spec: &PortSpec) -> Result<PoliceRule, Fault> {
    let macs = spec.get("mac").map(parse_macs).transpose().map_err(at("mac"))?;
    let storm = spec.get("storm").map(|text| {
        let storm = parse_scaled(text).and_then(|number| number.try_into().ok());
        storm.and_then(Storm::new).ok_or_else(|| bad_value("storm", text, STORM_CURE))
    });
    let storm = storm.transpose().map_err(at("storm"))?;
    Ok(PoliceRule { rate: rate(spec)?, storm, macs: macs.unwrap_or_default() })
}

fn rate(spec: &PortSpec) -> Result<Option<Rate>, Fault> {
    let burst = spec.get("burst");
    let Some(text) = spec.get("rate") else {
        return match burst {
            None => Ok(None),
            Some(burst) => {
                let cure = "it works with rate only: add rate=BITS, or drop it";
                Err(at("burst")(bad_value("burst", burst, cure)))
            }
        };
    };
    let number = parse_scaled(text).filter(|bits| Rate::new(*bits, None).is_some());
    let bits = number.ok_or_else(|| at("rate")(bad_value("rate", text, RATE_CURE)))?;
    let Some(text) = burst else { return Ok(Rate::new(bits, None)) };
    let rate = parse_scaled(text).and_then(|bytes| Rate::new(bits, Some(bytes)));
    rate.map(Some).ok_or_else(|| at("burst")(bad_value("burst", text, BURST_CURE)))
}

/// A number as people write it: `100M`, `1.5G`, `64000`. `None` if it is none, or not
/// whole, or too large.
fn parse_scaled(text: &str) -> Option<u64> {
    let scale = SUFFIXES.into_iter().find_map(|(suffix, zeros)| {
        let number =
            text.strip_suffix([suffix, suffix.to_ascii_lowercase(), suffix.to_ascii_uppercase()])?;
        Some((number, zeros))
    });
    let (number, zeros) = scale.unwrap_or((text, 0));
    let (whole, part) = match number.split_once('.') {
        Some((_, "")) => return None,
        Some((whole, part)) => (whole, part.trim_end_matches('0')),
        None => (number, ""),
    };
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(part) || part.len() > zeros {
        return None;
    }
    format!("{whole}{part:0<zeros$}").parse().ok()
}

/// The shortest way to write a number so that it is read as the same.
fn scaled(number: u64) -> String {
    let fits = |(suffix, zeros): (char, usize)| {
        let unit = 10u64.checked_pow(zeros.try_into().ok()?)?;
        (number >= unit && number.is_multiple_of(unit))
            .then(|| format!("{}{suffix}", number / unit))
    };
    SUFFIXES.into_iter().find_map(fits).unwrap_or_else(|| number.to_string())
}

fn parse_macs(text: &str) -> Result<ArrayVec<MacAddress, MACS_MAX>, MapProblem> {
    let mut macs = ArrayVec::new();
    for part in text.split('+') {
        let mac = parse_mac(part).ok_or_else(|| bad_value("mac", part, MAC_CURE))?;
        if mac == [0; 6] || mac.first().is_some_and(|byte| byte & 1 != 0) {
            let cure =
                "this can be no source address: write the guest's own (its first byte is even)";
            return Err(bad_value("mac", part, cure));
        }
        if macs.contains(&mac) {
            return Err(bad_value("mac", part, "this address is given twice: remove one"));
        }
        let cure = "that is one more than 16 addresses: drop some, or mac= altogether";
        macs.try_push(mac).map_err(|_| bad_value("mac", part, cure))?;
    }
    Ok(macs)
}

fn parse_mac(text: &str) -> Option<MacAddress> {
    let mut mac = MacAddress::default();
    let mut parts = text.split(':');
    for place in &mut mac {
        let part = parts.next()?;
        // `from_str_radix` would take "+5".
        let hexadecimal = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        *place = u8::from_str_radix(part, 16).ok().filter(|_| hexadecimal)?;
    }
    parts.next().is_none().then_some(mac)
}

fn mac_text(mac: &MacAddress) -> String {
    let bytes: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

/// The texts of rate, burst, storm and mac that differ from their defaults.
pub(super) fn texts(rule: &PoliceRule) -> [Option<String>; 4] {
    let rate = rule.rate;
    let burst = rate
        .filter(|rate| rate.burst_bytes() != Rate::default_burst(rate.bits_per_second()))
        .map(|rate| scaled(rate.burst_bytes()));
    let macs: Vec<String> = rule.macs.iter().map(mac_text).collect();
    [
        rate.map(|rate| scaled(rate.bits_per_second())),
        burst,
        rule.storm.map(|storm| scaled(storm.frames_per_second().into())),
        (!macs.is_empty()).then(|| macs.join("+")),
    ]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_are_read_as_people_write_them() {
        for (text, expected) in [
            ("0", Some(0)),
            ("64000", Some(64_000)),
            ("100M", Some(100_000_000)),
            ("1.5G", Some(1_500_000_000)),
            ("1.50g", Some(1_500_000_000)),
            ("0.000001m", Some(1)),
            ("80K", Some(80_000)),
            ("80k", Some(80_000)),
            ("1T", Some(1_000_000_000_000)),
            ("1.0", Some(1)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("99999999999T", None),
            ("1.5", None),
            ("0.0000001M", None),
            ("1.G", None),
            (".5G", None),
            ("+5", None),
            ("-5", None),
            ("", None),
            ("k", None),
            ("5kk", None),
            ("5 k", None),
            ("1.2.3k", None),
            ("100Mbit", None),
            ("1e6", None),
        ] {
            assert_eq!(parse_scaled(text), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_number_comes_back(digits in any::<u64>(), zeros in 0..20_u32) {
            let number = digits / 10_u64.pow(zeros.min(19)) ;
            let number = number.saturating_mul(10_u64.pow(zeros % 7));
            prop_assert_eq!(parse_scaled(&scaled(number)), Some(number));
        }
    }

    #[test]
    fn addresses_are_read_and_written() {
        let macs = parse_macs("52:54:00:12:34:56+02:aA:Bb:cc:0d:0E").unwrap();
        let text = macs.iter().map(mac_text).collect::<Vec<_>>().join("+");
        assert_eq!(text, "52:54:00:12:34:56+02:aa:bb:cc:0d:0e");
        for text in [
            "",
            "+",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52-54-00-12-34-56",
            "5:54:0:1:2:3",
            "52:54:00:12:34:5g",
            "52:54:00:12:34:+6",
            "52:54:00:12:34:56+",
            "525400123456",
        ] {
            assert!(parse_macs(text).is_err(), "{text}");
        }
        let many = |count: u8| {
            (0..count).map(|last| mac_text(&[2, 0, 0, 0, 0, last])).collect::<Vec<_>>().join("+")
        };
        assert_eq!(parse_macs(&many(16)).unwrap().len(), MACS_MAX);
        let problem = parse_macs(&many(17)).unwrap_err().to_string();
        assert!(problem.contains("one more than 16"), "{problem}");
    }
}
