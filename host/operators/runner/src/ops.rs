//! The operations that our own scripts have on the [`Bridge`]. With those that `extensions` keeps of the platform's they are
//! everything that an isolate can ask of its process; none opens a file, a socket or a process.
#![expect(clippy::needless_pass_by_value, reason = "deno_core's macro hands the state over like that")]

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;

use bytes::Bytes;
use deno_core::convert::{ByteString, Uint8Array};
use deno_core::{OpState, op2, v8};
use deno_error::JsErrorBox;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};

use crate::bridge::{Bridge, Departing, Ending, next_chunk};

/// Where log lines go.
pub(crate) struct Log(pub(crate) Box<dyn Fn(&str)>);

/// Told once `waitUntil` has nothing left and the process is to end.
pub(crate) struct Settled(pub(crate) Box<dyn Fn()>);

/// Where the modules of an operator pretend to be; nobody needs to see it.
pub(crate) const MODULE_BASE: &str = "operator:///";

type Shared = Rc<RefCell<Bridge>>;
type Fields = Vec<(ByteString, ByteString)>;

/// A refusal; or status, fields and the number of the body (-1: none).
type Fetched = (Option<String>, u16, Fields, i32);
/// A refusal; or the value, if there is one.
type Stored = (Option<String>, Option<Uint8Array>);

/// The authority of the host's services.
const HOST_URL: &str = "http://portcullis.internal";
const REFUSED_FIELD: &str = "x-portcullis-refused";
const URL_FIELD: HeaderName = HeaderName::from_static("x-portcullis-url");
/// Longest text of a refusal that is read.
const REFUSAL_BYTES_MAX: usize = 4096;

deno_core::extension!(
    portcullis,
    deps = [deno_webidl, deno_web, deno_crypto],
    ops = [
        op_operator_body_cancel,
        op_operator_body_end,
        op_operator_body_read,
        op_operator_body_room,
        op_operator_body_write,
        op_operator_call,
        op_operator_call_abort,
        op_operator_data_url,
        op_operator_fail,
        op_operator_fetch,
        op_operator_kv,
        op_operator_log,
        op_operator_request_headers,
        op_operator_respond,
        op_operator_settled,
    ],
);

fn bridge(state: &OpState) -> Shared {
    Rc::clone(state.borrow::<Shared>())
}

fn to_fields(headers: &HeaderMap) -> Fields {
    headers.iter().map(|(name, value)| (ByteString::from(name.as_str()), ByteString::from(value.as_bytes()))).collect()
}

/// Reads `[[name, value], ...]`, leaving out what describes a connection and what only we may say.
fn headers_of(scope: &mut v8::PinScope<'_, '_>, list: v8::Local<'_, v8::Array>) -> Result<HeaderMap, JsErrorBox> {
    let malformed = || JsErrorBox::type_error("a header field is malformed");
    let mut headers = HeaderMap::new();
    let mut of_the_connection: Vec<HeaderName> = Vec::new();
    for index in 0..list.length() {
        let pair = list.get_index(scope, index).and_then(|pair| v8::Local::<v8::Array>::try_from(pair).ok());
        let pair = pair.ok_or_else(malformed)?;
        let mut part = |at: u32| -> Result<ByteString, JsErrorBox> {
            let value = pair.get_index(scope, at).ok_or_else(malformed)?;
            <ByteString as deno_core::FromV8>::from_v8(scope, value).map_err(|_| malformed())
        };
        let name = HeaderName::from_bytes(part(0)?.as_ref()).map_err(|_| malformed())?;
        let value = HeaderValue::from_bytes(part(1)?.as_ref()).map_err(|_| malformed())?;
        if name == http::header::CONNECTION {
            let named = value.as_bytes().split(|byte| *byte == b',');
            of_the_connection.extend(named.filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok()));
        }
        if !is_ours_to_say(&name) {
            headers.append(name, value);
        }
    }
    for name in of_the_connection {
        headers.remove(name);
    }
    Ok(headers)
}

/// Framing and connections are the process's affair, our own name space the host's.
fn is_ours_to_say(name: &HeaderName) -> bool {
    const NAMES: [&str; 10] = [
        "connection",
        "content-length",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    NAMES.contains(&name.as_str()) || name.as_str().starts_with("x-portcullis-")
}

/// A body that is a string, bytes, or nothing.
fn bytes_of(scope: &mut v8::PinScope<'_, '_>, body: v8::Local<'_, v8::Value>) -> Option<Bytes> {
    if let Ok(text) = v8::Local::<v8::String>::try_from(body) {
        return Some(text.to_rust_string_lossy(scope).into());
    }
    let view = v8::Local::<v8::ArrayBufferView>::try_from(body).ok()?;
    // Copied: the operator may hold the same memory.
    let mut bytes = vec![0; view.byte_length()];
    let copied = view.copy_contents(&mut bytes);
    bytes.truncate(copied);
    Some(bytes.into())
}

#[op2]
fn op_operator_request_headers(state: &mut OpState, #[smi] id: u32) -> Result<Fields, JsErrorBox> {
    let bridge = bridge(state);
    let bridge = bridge.borrow();
    bridge.fields(id).map(to_fields).ok_or_else(|| JsErrorBox::type_error("the request is over"))
}

/// Answers a request. A body that is `undefined` is written afterwards.
#[op2(nofast)]
fn op_operator_respond(
    scope: &mut v8::PinScope<'_, '_>,
    state: &mut OpState,
    #[smi] id: u32,
    status: u16,
    headers: v8::Local<'_, v8::Array>,
    body: v8::Local<'_, v8::Value>,
) -> Result<(), JsErrorBox> {
    let malformed = |_| JsErrorBox::range_error("the status is not one");
    let status = StatusCode::from_u16(status).map_err(malformed)?;
    let headers = headers_of(scope, headers)?;
    let bridge = bridge(state);
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    if body.is_undefined() {
        bridge.borrow_mut().answer_slowly(id, response);
    } else {
        let body = bytes_of(scope, body).unwrap_or_default();
        bridge.borrow_mut().answer(id, response.map(|()| body));
    }
    Ok(())
}

/// Ends a request whose handler threw. The text is for development only.
#[op2]
fn op_operator_fail(state: &mut OpState, #[smi] id: u32, #[string] text: Option<String>) {
    let text = text.map(|text| text.replace(MODULE_BASE, ""));
    bridge(state).borrow_mut().refuse(id, crate::bridge::Outcome::Exception, text);
}

#[op2]
async fn op_operator_body_read(state: Rc<RefCell<OpState>>, #[smi] id: u32) -> Result<Option<Uint8Array>, JsErrorBox> {
    let bridge = bridge(&state.borrow());
    let Some(reading) = bridge.borrow().reading(id) else { return Ok(None) };
    match reading.next().await {
        Ok(Some(chunk)) => Ok(Some(Vec::from(chunk).into())),
        Ok(None) => {
            bridge.borrow_mut().end_reading(id);
            Ok(None)
        }
        Err(error) => {
            bridge.borrow_mut().end_reading(id);
            Err(JsErrorBox::type_error(format!("the body broke off: {error}")))
        }
    }
}

#[op2(fast)]
fn op_operator_body_cancel(state: &mut OpState, #[smi] id: u32) {
    bridge(state).borrow_mut().end_reading(id);
}

/// Hands over a chunk; false when the next one must wait.
#[op2(fast)]
fn op_operator_body_write(
    state: &mut OpState,
    #[smi] id: u32,
    #[buffer(copy)] chunk: Bytes,
) -> Result<bool, JsErrorBox> {
    let Some(writing) = bridge(state).borrow().writing(id) else { return Ok(false) };
    writing.write(chunk).map_err(|error| JsErrorBox::type_error(error.to_string()))
}

/// Waits for room for a chunk; false when nobody takes the body any more.
#[op2]
async fn op_operator_body_room(state: Rc<RefCell<OpState>>, #[smi] id: u32) -> bool {
    let writing = bridge(&state.borrow()).borrow().writing(id);
    match writing {
        Some(writing) => writing.room().await,
        None => false,
    }
}

#[op2(fast)]
fn op_operator_body_end(state: &mut OpState, #[smi] id: u32, whole: bool) {
    let ending = if whole { Ending::Whole } else { Ending::Broken };
    bridge(state).borrow_mut().end_writing(id, ending);
}

/// A number for a call to the host.
#[op2(fast)]
#[smi]
fn op_operator_call(state: &mut OpState) -> Result<u32, JsErrorBox> {
    let id = bridge(state).borrow_mut().open_call();
    id.ok_or_else(|| JsErrorBox::type_error("too many calls to the host at once"))
}

#[op2(fast)]
fn op_operator_call_abort(state: &mut OpState, #[smi] id: u32) {
    bridge(state).borrow().abort_call(id);
}

/// Has the host carry out one outgoing request.
#[op2]
fn op_operator_fetch(
    scope: &mut v8::PinScope<'_, '_>,
    state: &mut OpState,
    #[smi] id: u32,
    #[string] method: &str,
    #[string] url: &str,
    headers: v8::Local<'_, v8::Array>,
    body: v8::Local<'_, v8::Value>,
    streams: bool,
) -> Result<impl Future<Output = Result<Fetched, JsErrorBox>> + use<>, JsErrorBox> {
    let bridge = bridge(state);
    let malformed = |what: &str| JsErrorBox::type_error(format!("{what} cannot be sent"));
    let mut headers = headers_of(scope, headers)?;
    headers.remove(http::header::HOST);
    headers.insert(URL_FIELD, HeaderValue::from_str(url).map_err(|_| malformed("the address"))?);
    for (name, value) in [
        (http::header::ACCEPT, "*/*"),
        (http::header::ACCEPT_ENCODING, "gzip, br"),
        (http::header::USER_AGENT, "Portcullis"),
    ] {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    let body = if streams {
        bridge.borrow_mut().upload(id)
    } else {
        Departing::whole(bytes_of(scope, body).unwrap_or_default())
    };
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| malformed("the method"))?;
    let request = to_host(method, "/fetch", headers, body)?;
    Ok(async move {
        let result = carry_out(&bridge, id, request).await;
        bridge.borrow_mut().close_call(id);
        result
    })
}

fn to_host(method: Method, path: &str, headers: HeaderMap, body: Departing) -> Result<Request<Departing>, JsErrorBox> {
    let request = Request::builder().method(method).uri(format!("{HOST_URL}{path}")).body(body);
    let mut request = request.map_err(|error| JsErrorBox::type_error(error.to_string()))?;
    *request.headers_mut() = headers;
    Ok(request)
}

async fn carry_out(bridge: &Shared, id: u32, request: Request<Departing>) -> Result<Fetched, JsErrorBox> {
    let (host, aborted) = {
        let bridge = bridge.borrow();
        (bridge.host(), bridge.call(id))
    };
    let unreachable = || JsErrorBox::type_error("the host cannot be reached");
    let (host, aborted) = (host.ok_or_else(unreachable)?, aborted.ok_or_else(unreachable)?);
    let response = tokio::select! {
        response = host.call(request) => response.map_err(|_| unreachable())?,
        () = aborted.notified() => return Err(JsErrorBox::type_error("the request was aborted")),
    };
    let (parts, mut body) = response.into_parts();
    if parts.headers.contains_key(REFUSED_FIELD) {
        return Ok((Some(text_of(&mut body).await), 0, Vec::new(), -1));
    }
    let fields = to_fields(&parts.headers);
    let ends = http_body::Body::is_end_stream(&body);
    let body = if ends {
        -1
    } else {
        let mut bridge = bridge.borrow_mut();
        let id = bridge.new_id();
        bridge.read(id, body);
        i32::try_from(id).unwrap_or(-1)
    };
    Ok((None, parts.status.as_u16(), fields, body))
}

async fn text_of(body: &mut crate::bridge::Arriving) -> String {
    let mut text = Vec::new();
    while let Ok(Some(chunk)) = next_chunk(body).await {
        if text.len() < REFUSAL_BYTES_MAX {
            text.extend_from_slice(&chunk);
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// One use of the store.
#[op2]
fn op_operator_kv(
    scope: &mut v8::PinScope<'_, '_>,
    state: &mut OpState,
    #[string] method: &str,
    #[string] path: &str,
    value: v8::Local<'_, v8::Value>,
) -> Result<impl Future<Output = Result<Stored, JsErrorBox>> + use<>, JsErrorBox> {
    let bridge = bridge(state);
    let body = Departing::whole(bytes_of(scope, value).unwrap_or_default());
    let method = Method::from_bytes(method.as_bytes()).map_err(|error| JsErrorBox::type_error(error.to_string()))?;
    let request = to_host(method, path, HeaderMap::new(), body)?;
    let host = bridge.borrow().host();
    Ok(async move {
        let unreachable = || JsErrorBox::type_error("the host cannot be reached");
        let response = host.ok_or_else(unreachable)?.call(request).await.map_err(|_| unreachable())?;
        let (parts, mut body) = response.into_parts();
        if parts.headers.contains_key(REFUSED_FIELD) {
            return Ok((Some(text_of(&mut body).await), None));
        }
        let mut value = Vec::new();
        while let Some(chunk) = next_chunk(&mut body).await.map_err(|_| unreachable())? {
            value.extend_from_slice(&chunk);
        }
        Ok((None, (parts.status == StatusCode::OK).then(|| value.into())))
    })
}

/// Media type and contents of a `data:` address.
#[op2]
fn op_operator_data_url(#[string] url: &str) -> Option<(String, Uint8Array)> {
    let url = data_url::DataUrl::process(url).ok()?;
    let (contents, _) = url.decode_to_vec().ok()?;
    Some((url.mime_type().to_string(), contents.into()))
}

/// Writes to the log. The level is the console's; the log has none.
#[op2(fast)]
fn op_operator_log(state: &mut OpState, #[string] text: &str, #[smi] level: i32) {
    let _ = level;
    if let Some(log) = state.try_borrow::<Log>() {
        (log.0)(text);
    }
}

#[op2(fast)]
fn op_operator_settled(state: &mut OpState) {
    if let Some(settled) = state.try_borrow::<Settled>() {
        (settled.0)();
    }
}

/// Takes the place of deno_web's own: steps of a tenth of a millisecond. Finer ones tell what else the machine's caches and
/// cores are doing.
#[op2(fast)]
pub(crate) fn op_operator_now(state: &mut OpState, #[buffer] time: &mut [u8]) {
    const STEP_MICROSECONDS: u32 = 100;
    let elapsed = state.borrow::<deno_web::StartTime>().elapsed();
    let microseconds = elapsed.subsec_micros() / STEP_MICROSECONDS * STEP_MICROSECONDS;
    let seconds = u32::try_from(elapsed.as_secs()).unwrap_or(u32::MAX);
    for (part, value) in time.chunks_exact_mut(4).zip([seconds, microseconds * 1000]) {
        part.copy_from_slice(&value.to_ne_bytes());
    }
}

/// Takes the place of deno_core's own, which ends the event loop: what nobody caught is a line in the log.
#[op2(nofast)]
pub(crate) fn op_operator_exception<'s>(
    scope: &mut v8::PinScope<'s, '_>,
    state: Rc<RefCell<OpState>>,
    exception: v8::Local<'s, v8::Value>,
    promise: bool,
) {
    let _ = promise;
    // Formatting a stack reads the state.
    let error = deno_core::error::JsError::from_v8_exception(scope, exception);
    let text = error.stack.as_deref().unwrap_or(&error.exception_message);
    if let Some(log) = state.borrow().try_borrow::<Log>() {
        (log.0)(&format!("{text}\n"));
    }
}
