//! As much of HTTP/1.1 as a control socket needs: a request, a response, and the change to another protocol.
//!
//! Both sides read bounded heads and bodies. A connection serves one request: they are few, and a socket is cheap.

use std::io::{Read, Write};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

/// The longest head.
const LONGEST_HEAD: usize = 8 << 10;
/// The longest body.
const LONGEST_BODY: usize = 1 << 20;
/// The protocol that a connection changes to: bytes as they come.
const STREAM: &str = "realm-stream";

/// What a client asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Request {
    /// `GET` or `PUT`.
    pub(crate) method: String,
    /// The path, without what follows a question mark.
    pub(crate) path: String,
    /// That.
    pub(crate) query: Vec<(String, String)>,
    /// Whether the client wants the connection as a stream.
    pub(crate) upgrade: bool,
    /// What was sent with it.
    pub(crate) body: Vec<u8>,
}

impl Request {
    /// A number in the query.
    pub(crate) fn number<T: std::str::FromStr>(&self, key: &str) -> Option<T> {
        self.query.iter().find(|(name, _)| name == key).and_then(|(_, value)| value.parse().ok())
    }
}

/// What is answered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Response {
    /// The status.
    pub(crate) status: u16,
    /// A JSON value, or nothing.
    pub(crate) body: Vec<u8>,
}

impl Response {
    /// Done; there is nothing to say.
    pub(crate) fn done() -> Self {
        Self { status: 204, body: Vec::new() }
    }

    /// A value.
    pub(crate) fn value(value: &Value) -> Self {
        Self { status: 200, body: value.to_string().into_bytes() }
    }

    /// A failure.
    pub(crate) fn error(status: u16, text: &str) -> Self {
        Self { status, body: json!({ "error": text }).to_string().into_bytes() }
    }

    /// As it is sent.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            204 => "No Content",
            400 => "Bad Request",
            404 => "Not Found",
            405 => "Method Not Allowed",
            426 => "Upgrade Required",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        let mut head = format!("HTTP/1.1 {} {reason}\r\nConnection: close\r\n", self.status);
        if !self.body.is_empty() {
            head.push_str("Content-Type: application/json\r\n");
        }
        if self.status != 204 {
            head.push_str(&format!("Content-Length: {}\r\n", self.body.len()));
        }
        [head.as_bytes(), b"\r\n", &self.body].concat()
    }

    /// What is said before a connection becomes a stream.
    pub(crate) fn switching() -> Vec<u8> {
        format!("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {STREAM}\r\n\r\n")
            .into_bytes()
    }

    /// What went wrong, in words.
    pub(crate) fn failure(&self) -> String {
        serde_json::from_slice::<Value>(&self.body)
            .ok()
            .and_then(|value| Some(value.get("error")?.as_str()?.to_owned()))
            .unwrap_or_else(|| format!("status {}", self.status))
    }
}

/// Reads a request. An error is what to answer.
pub(crate) fn read_request(stream: &mut impl Read) -> Result<Request, Response> {
    let bad = |text: &str| Response::error(400, text);
    let head = read_head(stream).map_err(|error| bad(&error.to_string()))?;
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut parsed = httparse::Request::new(&mut headers);
    match parsed.parse(&head) {
        Ok(httparse::Status::Complete(_)) => {}
        _ => return Err(bad("this is no HTTP/1.1 request")),
    }
    let target = parsed.path.unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let query = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let header = |name: &str| find(parsed.headers, name);
    if header("transfer-encoding").is_some() {
        return Err(bad("a body with its length is expected"));
    }
    let length = match header("content-length") {
        Some(text) => {
            text.parse().ok().filter(|length| *length <= LONGEST_BODY).ok_or(bad("the body is too long"))?
        }
        None => 0,
    };
    let upgrade = header("upgrade").is_some_and(|protocol| protocol.eq_ignore_ascii_case(STREAM));
    let (method, path) = (parsed.method.unwrap_or_default().to_owned(), path.to_owned());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).map_err(|_| bad("the body ended early"))?;
    Ok(Request { method, path, query, upgrade, body })
}

/// Asks a question of which the answer is a value or nothing.
pub(crate) fn call(stream: &mut (impl Read + Write), method: &str, target: &str) -> Result<Response> {
    let request = format!(
        "{method} {target} HTTP/1.1\r\nHost: realm\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes())?;
    read_response(stream)
}

/// Asks for a stream. What follows the answer of 101 is the stream's.
pub(crate) fn upgrade(stream: &mut (impl Read + Write), target: &str) -> Result<Response> {
    let request =
        format!("GET {target} HTTP/1.1\r\nHost: realm\r\nConnection: Upgrade\r\nUpgrade: {STREAM}\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    read_response(stream)
}

fn read_response(stream: &mut impl Read) -> Result<Response> {
    let head = read_head(stream)?;
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut parsed = httparse::Response::new(&mut headers);
    ensure!(matches!(parsed.parse(&head), Ok(httparse::Status::Complete(_))), "the answer is no HTTP");
    let status = parsed.code.context("the answer has no status")?;
    let length: usize = match find(parsed.headers, "content-length") {
        Some(text) if status != 101 => text.parse().context("the answer has no length")?,
        _ => 0,
    };
    ensure!(length <= LONGEST_BODY, "the answer is too long");
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(Response { status, body })
}

fn find<'a>(headers: &'a [httparse::Header<'_>], name: &str) -> Option<&'a str> {
    let header = headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
    std::str::from_utf8(header.value).ok().map(str::trim)
}

/// Everything up to the empty line, and no byte more: what follows may be a stream's.
fn read_head(stream: &mut impl Read) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(head.len() < LONGEST_HEAD, "the head is too long");
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => bail!("the connection ended early"),
            Ok(_) => head.push(byte[0]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(head)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Request, Response> {
        read_request(&mut text.as_bytes())
    }

    #[test]
    fn a_request_is_taken_apart() {
        let text = "PUT /api/v1/x?rows=4&cols=a HTTP/1.1\r\nHost: x\r\ncontent-length: 3\r\n\r\nabcdef";
        let request = parse(text).unwrap();
        assert_eq!((request.method.as_str(), request.path.as_str()), ("PUT", "/api/v1/x"));
        assert_eq!((request.number::<u16>("rows"), request.number::<u16>("cols")), (Some(4), None));
        assert_eq!((request.body.as_slice(), request.upgrade), (&b"abc"[..], false));
        assert!(parse("GET / HTTP/1.1\r\nUpgrade: Realm-Stream\r\n\r\n").unwrap().upgrade);
    }

    #[test]
    fn requests_without_an_end_or_a_measure_are_refused() {
        for text in [
            "",
            "GET",
            "GET / HTTP/1.1\r\n",
            "\r\n\r\n",
            "GET /\r\n\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: 5\r\n\r\nabc",
            "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            &format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(LONGEST_HEAD)),
        ] {
            assert_eq!(parse(text).unwrap_err().status, 400, "{text:.40}");
        }
    }

    #[test]
    fn answers_come_back_as_they_were_sent() {
        for response in [Response::done(), Response::value(&json!({"a": 1})), Response::error(404, "no")] {
            assert_eq!(read_response(&mut &response.bytes()[..]).unwrap(), response);
        }
        let stream = [Response::switching(), b"rest".to_vec()].concat();
        let mut stream = &stream[..];
        assert_eq!(read_response(&mut stream).unwrap().status, 101);
        assert_eq!(stream, b"rest");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_a_refusal(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = read_request(&mut &bytes[..]);
            let _ = read_response(&mut &bytes[..]);
            let request = [b"GET /a?b=c HTTP/1.1\r\n", &bytes[..], b"\r\n\r\n"].concat();
            let _ = read_request(&mut &request[..]);
        }
    }
}
