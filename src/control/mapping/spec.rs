//! A port as somebody wrote it: keys and texts, with their places, before anything
//! is understood. A map, a table of a file and a change all become one of these.

use super::problem::{MapError, MapProblem, Origin};
use super::{OPTIONS, PortConfig, build};
use crate::frame::Tpid;

/// What a `[[port]]` table and `set` call the VLANS of a map.
pub const VLAN: &str = "vlan";
/// What a `[[port]]` table calls the DEVICE of a map.
pub const DEVICE: &str = "device";

#[derive(Debug, Clone)]
struct Text {
    key: &'static str,
    text: String,
    line: Option<usize>,
}

/// A port as written.
#[derive(Debug, Clone)]
pub struct PortSpec {
    origin: Origin,
    texts: Vec<Text>,
}

impl PortSpec {
    /// A port without any key.
    pub fn new(origin: Origin) -> Self {
        Self { origin, texts: Vec::new() }
    }

    /// Takes `VLANS=DEVICE[,OPTION...]` apart.
    ///
    /// # Errors
    /// [`MapProblem`] if there is no `=`, and for options unknown or given twice.
    pub fn from_map(map: &str, origin: Origin) -> Result<Self, MapProblem> {
        let (vlans, rest) = map.split_once('=').ok_or(MapProblem::NoDevice)?;
        let (device, options) =
            rest.split_once(',').map_or((rest, None), |(device, options)| (device, Some(options)));
        let mut spec = Self::new(origin);
        spec.set(VLAN, vlans.to_owned(), None);
        spec.set(DEVICE, device.to_owned(), None);
        for part in options.into_iter().flat_map(|options| options.split(',')) {
            let unknown = || MapProblem::UnknownOption(part.to_owned());
            let (key, value) = part.split_once('=').ok_or_else(unknown)?;
            let key = OPTIONS.into_iter().find(|option| *option == key).ok_or_else(unknown)?;
            if spec.get(key).is_some() {
                return Err(MapProblem::OptionTwice(key.to_owned()));
            }
            spec.set(key, value.to_owned(), None);
        }
        Ok(spec)
    }

    /// The text of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.texts.iter().find(|other| other.key == key).map(|other| other.text.as_str())
    }

    /// Gives a key a text, and the line of the file where it stands.
    pub fn set(&mut self, key: &'static str, text: String, line: Option<usize>) {
        self.remove(key);
        self.texts.push(Text { key, text, line });
    }

    /// Takes a key away.
    pub fn remove(&mut self, key: &str) {
        self.texts.retain(|other| other.key != key);
    }

    /// Where it was written.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Understands it.
    ///
    /// # Errors
    /// [`MapError`] for the first thing refused, at its line.
    pub fn build(&self, default_tpid: Tpid) -> Result<PortConfig, MapError> {
        build::port(self, default_tpid).map_err(|(key, problem)| {
            let line = key.and_then(|key| self.texts.iter().find(|text| text.key == key)?.line);
            let origin = match (&self.origin, line) {
                (Origin::File { file, .. }, Some(line)) => {
                    Origin::File { file: file.clone(), line }
                }
                (origin, _) => origin.clone(),
            };
            MapError { origin, key, problem }
        })
    }
}
