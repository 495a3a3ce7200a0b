//! Varlink's messages (<https://varlink.org/Method-Call>): one JSON object each,
//! ended by a NUL.

use crate::control::api::{DESCRIPTION, INTERFACE, Request};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

const SERVICE: &str = "org.varlink.service";
/// The interface every varlink service has, as its specification gives it.
const SERVICE_DESCRIPTION: &str = include_str!("org.varlink.service.varlink");

/// A call, understood.
#[derive(Debug)]
pub enum Call {
    /// For the daemon.
    Method {
        /// Which, and its parameters.
        request: Request,
        /// The caller takes many answers.
        more: bool,
        /// The caller wants no answer.
        oneway: bool,
    },
    /// About the service itself.
    Service {
        /// The answer.
        reply: Value,
        /// The caller wants no answer.
        oneway: bool,
    },
    /// Not possible.
    Refused {
        /// Why.
        refusal: Refusal,
        /// The caller wants no answer.
        oneway: bool,
    },
}

/// An error to answer with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Its name, with the interface.
    pub error: String,
    /// Its parameters.
    pub parameters: Value,
}

impl Refusal {
    fn of_service(error: &str, key: &str, value: &str) -> Self {
        Self { error: format!("{SERVICE}.{error}"), parameters: json!({ key: value }) }
    }

    fn of_ours(error: &str, key: &str, value: &str) -> Self {
        Self { error: format!("{INTERFACE}.{error}"), parameters: json!({ key: value }) }
    }

    /// The method exists only with `more`.
    pub fn expected_more() -> Self {
        Self { error: format!("{SERVICE}.ExpectedMore"), parameters: json!({}) }
    }

    /// There is no port on this device.
    pub fn no_such_port(name: &str) -> Self {
        Self::of_ours("NoSuchPort", "name", name)
    }

    /// Another format of the hand-over is wanted than there is.
    pub fn other_format(format: u32) -> Self {
        let error = format!("{INTERFACE}.OtherFormat");
        Self { error, parameters: json!({ "format": format }) }
    }

    /// What was asked for makes no sense or cannot work.
    pub fn refused(message: impl ToString) -> Self {
        Self::of_ours("Refused", "message", &message.to_string())
    }

    /// It should have worked.
    pub fn failed(message: impl ToString) -> Self {
        Self::of_ours("Failed", "message", &message.to_string())
    }
}

#[derive(Deserialize)]
struct Envelope {
    method: String,
    #[serde(default)]
    parameters: Option<Map<String, Value>>,
    #[serde(default)]
    more: Option<bool>,
    #[serde(default)]
    oneway: Option<bool>,
}

/// Reads one call; `None` if it is nothing that could be answered: not JSON, or no
/// method.
pub fn read_call(message: &[u8], may_change: bool) -> Option<Call> {
    let envelope: Envelope = serde_json::from_slice(message).ok()?;
    let more = envelope.more.unwrap_or(false);
    let oneway = envelope.oneway.unwrap_or(false);
    let refuse = |refusal| Some(Call::Refused { refusal, oneway });
    let parameters = envelope.parameters.unwrap_or_default();
    let Some((interface, method)) = envelope.method.rsplit_once('.') else {
        return refuse(Refusal::of_service("InterfaceNotFound", "interface", &envelope.method));
    };
    match interface {
        INTERFACE => {}
        SERVICE => {
            return match service(method, &parameters) {
                Ok(reply) => Some(Call::Service { reply, oneway }),
                Err(refusal) => refuse(refusal),
            };
        }
        _ => return refuse(Refusal::of_service("InterfaceNotFound", "interface", interface)),
    }
    if !is_method(method) {
        return refuse(Refusal::of_service("MethodNotFound", "method", &envelope.method));
    }
    let whole = json!({ "method": envelope.method, "parameters": parameters });
    match serde_json::from_value::<Request>(whole) {
        Ok(request) if request.changes() && !may_change => {
            refuse(Refusal { error: format!("{SERVICE}.PermissionDenied"), parameters: json!({}) })
        }
        // Many answers and none: a contradiction.
        Ok(request) if oneway && more && request.streams() => {
            refuse(Refusal::of_service("InvalidParameter", "parameter", "oneway"))
        }
        Ok(request) => Some(Call::Method { request, more, oneway }),
        Err(error) => {
            let error = error.to_string();
            // "missing field `name`": the name is what varlink wants to be told.
            let parameter = error.split('`').nth(1).unwrap_or(&error);
            refuse(Refusal::of_service("InvalidParameter", "parameter", parameter))
        }
    }
}

/// Whether the interface file has such a method.
fn is_method(name: &str) -> bool {
    DESCRIPTION.lines().any(|line| {
        line.strip_prefix("method ")
            .and_then(|line| line.split('(').next())
            .is_some_and(|method| method == name)
    })
}

fn service(method: &str, parameters: &Map<String, Value>) -> Result<Value, Refusal> {
    match method {
        "GetInfo" => Ok(json!({
            "vendor": "vlanswitchd",
            "product": "vlanswitchd",
            "version": env!("CARGO_PKG_VERSION"),
            "url": env!("CARGO_PKG_REPOSITORY"),
            "interfaces": [SERVICE, INTERFACE],
        })),
        "GetInterfaceDescription" => match parameters.get("interface").and_then(Value::as_str) {
            Some(INTERFACE) => Ok(json!({ "description": DESCRIPTION })),
            Some(SERVICE) => Ok(json!({ "description": SERVICE_DESCRIPTION })),
            Some(other) => Err(Refusal::of_service("InterfaceNotFound", "interface", other)),
            None => Err(Refusal::of_service("InvalidParameter", "parameter", "interface")),
        },
        _ => {
            let name = format!("{SERVICE}.{method}");
            Err(Refusal::of_service("MethodNotFound", "method", &name))
        }
    }
}

/// Appends an answer.
pub fn write_reply(output: &mut Vec<u8>, parameters: &impl Serialize, continues: bool) {
    #[derive(Serialize)]
    struct Reply<'p, P> {
        parameters: &'p P,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        continues: bool,
    }
    append(output, &Reply { parameters, continues });
}

/// Appends an error.
pub fn write_error(output: &mut Vec<u8>, refusal: &Refusal) {
    append(output, &json!({ "error": refusal.error, "parameters": refusal.parameters }));
}

fn append(output: &mut Vec<u8>, message: &impl Serialize) {
    // Writing to memory cannot fail, and our values all have a JSON form.
    let _ = serde_json::to_writer(&mut *output, message);
    output.push(0);
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::panic,
        clippy::indexing_slicing,
        reason = "tests fail by panicking"
    )]
    use super::*;
    use proptest::prelude::*;

    fn error_of(message: &str, may_change: bool) -> String {
        match read_call(message.as_bytes(), may_change).unwrap() {
            Call::Refused { refusal, .. } => format!("{} {}", refusal.error, refusal.parameters),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn calls_are_understood() {
        let call = r#"{"method":"org.vlanswitchd.GetPort","parameters":{"name":"tap-web1"}}"#;
        let Call::Method { request, more: false, oneway: false } =
            read_call(call.as_bytes(), false).unwrap()
        else {
            panic!("not a call")
        };
        assert_eq!(request, Request::GetPort { name: "tap-web1".into() });
        let call = r#"{"method":"org.vlanswitchd.GetStatus","more":true,"oneway":true}"#;
        assert!(matches!(
            read_call(call.as_bytes(), false).unwrap(),
            Call::Method { request: Request::GetStatus {}, more: true, oneway: true }
        ));
    }

    #[test]
    fn what_cannot_be_called_is_refused_by_name() {
        for (message, expected) in [
            (r#"{"method":"GetStatus"}"#, r#"InterfaceNotFound {"interface":"GetStatus"}"#),
            (r#"{"method":"org.x.Y"}"#, r#"InterfaceNotFound {"interface":"org.x"}"#),
            (
                r#"{"method":"org.vlanswitchd.Y"}"#,
                r#"MethodNotFound {"method":"org.vlanswitchd.Y"}"#,
            ),
            (r#"{"method":"org.vlanswitchd.GetPort"}"#, r#"InvalidParameter {"parameter":"name"}"#),
            (
                r#"{"method":"org.vlanswitchd.Capture","more":true,"oneway":true}"#,
                r#"PermissionDenied {}"#,
            ),
            (
                r#"{"method":"org.vlanswitchd.Monitor","more":true,"oneway":true}"#,
                r#"InvalidParameter {"parameter":"oneway"}"#,
            ),
            (
                r#"{"method":"org.vlanswitchd.GetStats","more":true,"oneway":true}"#,
                r#"InvalidParameter {"parameter":"oneway"}"#,
            ),
            (
                r#"{"method":"org.vlanswitchd.RemovePort","parameters":{"name":"t"}}"#,
                "PermissionDenied {}",
            ),
        ] {
            assert_eq!(error_of(message, false), format!("{SERVICE}.{expected}"));
        }
    }

    #[test]
    fn every_method_of_the_file_has_a_type_and_its_parameters_names() {
        let methods: Vec<&str> = DESCRIPTION
            .lines()
            .filter_map(|line| line.strip_prefix("method ")?.split('(').next())
            .collect();
        assert_eq!(methods.len(), 16);
        for method in methods {
            // With every parameter there is, of a wrong type for each: a method without
            // a type would be an unknown variant.
            let call = format!(r#"{{"method":"{INTERFACE}.{method}","parameters":{{}}}}"#);
            match read_call(call.as_bytes(), true).unwrap() {
                Call::Method { .. } => {}
                Call::Refused { refusal, .. } => {
                    let parameter = refusal.parameters["parameter"].as_str().unwrap().to_owned();
                    assert!(
                        DESCRIPTION.contains(&format!("{method}({parameter}: ")),
                        "{method}: {parameter}"
                    );
                }
                Call::Service { .. } => panic!("{method} is ours"),
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = read_call(&bytes, true);
        }
    }
}
