//! As much of HTTP/1.1 (RFC 9112) as a reader of metrics needs: one request, one
//! answer, then the connection is closed.

/// What metrics are, for whoever asks (OpenMetrics 1.0).
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Headers more than this are no honest request.
const HEADERS_MAX: usize = 64;

/// Length of the request at the start of the bytes, if all of it is there.
pub fn request_length(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|end| end == b"\r\n\r\n").map(|start| start + 4)
}

/// Whether this is a request for the metrics; the refusal to send if not.
///
/// # Errors
/// The bytes of the refusal.
pub fn read_request(bytes: &[u8]) -> Result<(), Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    if !request.parse(bytes).is_ok_and(|status| status.is_complete()) {
        return Err(answer("400 Bad Request", "text/plain", "this is no HTTP request\n"));
    }
    let path = request.path.unwrap_or_default();
    match (request.method, path.split('?').next()) {
        (Some("GET"), Some("/metrics")) => Ok(()),
        (Some("GET"), _) => Err(answer("404 Not Found", "text/plain", "metrics are at /metrics\n")),
        _ => Err(answer("405 Method Not Allowed", "text/plain", "GET only\n")),
    }
}

/// The answer with the metrics.
pub fn response(text: &str) -> Vec<u8> {
    answer("200 OK", CONTENT_TYPE, text)
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
            Ok(()) => "200".into(),
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
    fn a_request_ends_with_an_empty_line() {
        assert_eq!(request_length(b"GET / HTTP/1.1\r\n"), None);
        assert_eq!(request_length(b"GET / HTTP/1.1\r\n\r\nrest"), Some(18));
    }
}
