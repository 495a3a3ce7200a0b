//! As much of HTTP/1.1 (RFC 9112) as a reader of metrics needs: one request, one
//! answer, then the connection is closed.

use crate::control::metrics::to_text_format;

/// The two forms metrics come in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0, for those who say that they know it.
    OpenMetrics,
    /// Prometheus' text format, for all others.
    #[default]
    Text,
}

impl Format {
    fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Headers more than this are no honest request.
const HEADERS_MAX: usize = 64;

/// Length of the request at the start of the bytes, if all of it is there.
pub fn request_length(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|end| end == b"\r\n\r\n").map(|start| start + 4)
}

/// Whether this is a request for the metrics, and in which form; the refusal to send
/// if not.
///
/// # Errors
/// The bytes of the refusal.
pub fn read_request(bytes: &[u8]) -> Result<Format, Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    if !request.parse(bytes).is_ok_and(|status| status.is_complete()) {
        return Err(answer("400 Bad Request", "text/plain", "this is no HTTP request\n"));
    }
    let path = request.path.unwrap_or_default();
    match (request.method, path.split('?').next()) {
        (Some("GET"), Some("/metrics")) => Ok(wanted(request.headers)),
        (Some("GET"), _) => Err(answer("404 Not Found", "text/plain", "metrics are at /metrics\n")),
        _ => Err(answer("405 Method Not Allowed", "text/plain", "GET only\n")),
    }
}

fn wanted(headers: &[httparse::Header<'_>]) -> Format {
    let known = headers.iter().any(|header| {
        let accepted = String::from_utf8_lossy(header.value).to_ascii_lowercase();
        header.name.eq_ignore_ascii_case("accept")
            && accepted.contains("application/openmetrics-text")
    });
    if known { Format::OpenMetrics } else { Format::Text }
}

/// The answer with the metrics, from what they are as OpenMetrics.
pub fn response(open_metrics: &str, format: Format) -> Vec<u8> {
    match format {
        Format::OpenMetrics => answer("200 OK", format.content_type(), open_metrics),
        Format::Text => answer("200 OK", format.content_type(), &to_text_format(open_metrics)),
    }
}

fn answer(status: &str, content_type: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;

    fn status(request: &str) -> String {
        match read_request(request.as_bytes()) {
            Ok(_) => "200".into(),
            Err(refusal) => {
                String::from_utf8(refusal).unwrap().split(' ').nth(1).unwrap().to_owned()
            }
        }
    }

    #[test]
    fn only_get_metrics_is_served() {
        assert_eq!(status("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), "200");
        assert_eq!(status("GET /metrics?x=1 HTTP/1.0\r\n\r\n"), "200");
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), "404");
        assert_eq!(status("POST /metrics HTTP/1.1\r\n\r\n"), "405");
        assert_eq!(status("\0\0\0\0\r\n\r\n"), "400");
    }

    #[test]
    fn the_form_is_what_the_reader_knows() {
        let asked = |header: &str| {
            read_request(format!("GET /metrics HTTP/1.1\r\n{header}\r\n").as_bytes()).unwrap()
        };
        // What Prometheus 2.42 says.
        let prometheus = "accept: application/openmetrics-text;version=1.0.0,\
                          text/plain;version=0.0.4;q=0.5,*/*;q=0.1\r\n";
        assert_eq!(asked(prometheus), Format::OpenMetrics);
        assert_eq!(asked("Accept: */*\r\n"), Format::Text);
        assert_eq!(asked(""), Format::Text);
    }

    #[test]
    fn a_request_ends_with_an_empty_line() {
        assert_eq!(request_length(b"GET / HTTP/1.1\r\n"), None);
        assert_eq!(request_length(b"GET / HTTP/1.1\r\n\r\nrest"), Some(18));
    }
}
