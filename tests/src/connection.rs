//! A connection that is kept open for many requests, for measurements; [`crate::client`] has one per request.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::runtime::Runtime;

/// One HTTP/1.1 connection, used by one request at a time.
pub struct Connection {
    runtime: Runtime,
    sender: SendRequest<Empty<Bytes>>,
}

impl Connection {
    /// Connects.
    pub fn open(address: SocketAddr) -> Result<Connection, String> {
        let fail = |error: &dyn std::fmt::Display| format!("cannot connect to {address}: {error}");
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| fail(&error))?;
        let sender = runtime.block_on(async {
            let stream = tokio::net::TcpStream::connect(address).await.map_err(|error| fail(&error))?;
            stream.set_nodelay(true).map_err(|error| fail(&error))?;
            let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|error| fail(&error))?;
            // It ends with the runtime, and what breaks it the next request reports.
            tokio::spawn(connection);
            Ok::<_, String>(sender)
        })?;
        Ok(Connection { runtime, sender })
    }

    /// Sends a `GET`, reads the whole answer and returns its status.
    pub fn get(&mut self, path: &str, authorization: Option<&str>) -> Result<u16, String> {
        let authorization = authorization.map(|value| ("authorization", value));
        self.get_with(path, authorization.as_slice())
    }

    /// The same, with these fields.
    pub fn get_with(&mut self, path: &str, fields: &[(&str, &str)]) -> Result<u16, String> {
        let mut request = Request::get(path).header("host", "api.example.com");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let request = request.body(Empty::new()).map_err(|error| error.to_string())?;
        let sender = &mut self.sender;
        self.runtime.block_on(async {
            sender.ready().await.map_err(|error| error.to_string())?;
            let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
            let status = response.status().as_u16();
            response.into_body().collect().await.map_err(|error| error.to_string())?;
            Ok(status)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::Upstream;

    #[test]
    fn serves_several_requests_on_one_connection() {
        let upstream = Upstream::start().unwrap();
        let mut connection = Connection::open(upstream.address()).unwrap();
        assert_eq!(connection.get("/a", None), Ok(200));
        assert_eq!(connection.get("/b", Some("Bearer x")), Ok(200));
        let seen: Vec<String> = upstream.take_requests().into_iter().map(|request| request.path).collect();
        assert_eq!(seen, ["/a", "/b"]);
    }
}
