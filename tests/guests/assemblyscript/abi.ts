// The ABI for AssemblyScript, whose texts are UTF-16 and belong to a garbage collector: what goes to the host is a copy in
// UTF-8, and what the host puts into memory from `malloc` is copied and freed.

// @ts-ignore: decorator
@external("env", "proxy_log")
declare function proxy_log(level: u32, message: usize, size: usize): u32;
// @ts-ignore: decorator
@external("env", "proxy_set_tick_period_milliseconds")
export declare function setTickPeriod(milliseconds: u32): u32;
// @ts-ignore: decorator
@external("env", "proxy_get_buffer_bytes")
declare function proxy_get_buffer_bytes(buffer: u32, start: u32, most: u32, bytes: usize, size: usize): u32;
// @ts-ignore: decorator
@external("env", "proxy_set_buffer_bytes")
declare function proxy_set_buffer_bytes(buffer: u32, start: u32, size: u32, bytes: usize, length: usize): u32;
// @ts-ignore: decorator
@external("env", "proxy_get_header_map_value")
declare function proxy_get_header_map_value(map: u32, name: usize, nameSize: usize, value: usize, size: usize): u32;
// @ts-ignore: decorator
@external("env", "proxy_add_header_map_value")
declare function proxy_add_header_map_value(map: u32, name: usize, nameSize: usize, value: usize, size: usize): u32;
// @ts-ignore: decorator
@external("env", "proxy_remove_header_map_value")
declare function proxy_remove_header_map_value(map: u32, name: usize, nameSize: usize): u32;
// @ts-ignore: decorator
@external("env", "proxy_continue_stream")
export declare function continueStream(stream: u32): u32;
// @ts-ignore: decorator
@external("env", "proxy_send_local_response")
declare function proxy_send_local_response(
  status: u32, details: usize, detailsSize: usize, body: usize, bodySize: usize, fields: usize, fieldsSize: usize, grpc: i32,
): u32;
// @ts-ignore: decorator
@external("env", "proxy_http_call")
declare function proxy_http_call(
  upstream: usize, upstreamSize: usize, fields: usize, fieldsSize: usize, body: usize, bodySize: usize, trailers: usize,
  trailersSize: usize, timeout: u32, call: usize,
): u32;
// @ts-ignore: decorator
@external("env", "proxy_get_shared_data")
declare function proxy_get_shared_data(key: usize, keySize: usize, value: usize, size: usize, cas: usize): u32;
// @ts-ignore: decorator
@external("env", "proxy_set_shared_data")
declare function proxy_set_shared_data(key: usize, keySize: usize, value: usize, size: usize, cas: u32): u32;
// @ts-ignore: decorator
@external("env", "proxy_get_property")
declare function proxy_get_property(path: usize, pathSize: usize, value: usize, size: usize): u32;
// @ts-ignore: decorator
@external("env", "proxy_set_effective_context")
export declare function setEffectiveContext(context: u32): u32;
// @ts-ignore: decorator
@external("wasi_snapshot_preview1", "random_get")
declare function random_get(bytes: usize, size: usize): u32;
// @ts-ignore: decorator
@external("wasi_snapshot_preview1", "proc_exit")
declare function proc_exit(code: u32): void;

export const OK: u32 = 0;

export const REQUEST_HEADERS: u32 = 0;
export const RESPONSE_HEADERS: u32 = 2;
export const CALL_HEADERS: u32 = 6;

export const REQUEST_BODY: u32 = 0;
export const RESPONSE_BODY: u32 = 1;
export const CALL_BODY: u32 = 4;
export const VM_CONFIGURATION: u32 = 6;
export const CONFIGURATION: u32 = 7;

export const GO_ON: u32 = 0;
export const STOP: u32 = 1;

// Where the host writes pointer, length and number of an answer.
const answer: usize = memory.data(12);

// Takes the place of the compiler's import `env.abort`, which no Proxy-Wasm host has. Exiting does not end a guest in
// Envoy; the `unreachable` that the compiler puts behind it does.
export function abort(message: string | null, _file: string | null, line: u32, column: u32): void {
  log("abort: " + (message === null ? "" : message) + " (" + line.toString() + ":" + column.toString() + ")");
  proc_exit(255);
}

function pointer(text: ArrayBuffer): usize {
  return changetype<usize>(text);
}

function utf8(text: string): ArrayBuffer {
  return String.UTF8.encode(text);
}

// Text that the host has put into memory from `malloc`; the second word of the answer is its length.
function take(): string {
  const bytes = load<usize>(answer);
  const text = String.UTF8.decodeUnsafe(bytes, load<usize>(answer, 4));
  if (bytes !== 0) heap.free(bytes);
  return text;
}

export function log(line: string): void {
  const bytes = utf8(line);
  proxy_log(3, pointer(bytes), bytes.byteLength);
}

// The first value of a field, if there is one.
export function field(map: u32, name: string): string | null {
  const key = utf8(name);
  return proxy_get_header_map_value(map, pointer(key), key.byteLength, answer, answer + 4) === OK ? take() : null;
}

export function addField(map: u32, name: string, value: string): u32 {
  const key = utf8(name);
  const text = utf8(value);
  return proxy_add_header_map_value(map, pointer(key), key.byteLength, pointer(text), text.byteLength);
}

export function removeField(map: u32, name: string): u32 {
  const key = utf8(name);
  return proxy_remove_header_map_value(map, pointer(key), key.byteLength);
}

// The status of the last question that has no other way to tell it.
export let status: u32 = OK;

export function buffer(buffer: u32, size: u32): string {
  status = proxy_get_buffer_bytes(buffer, 0, size, answer, answer + 4);
  return status === OK ? take() : "";
}

export function setBuffer(buffer: u32, start: u32, size: u32, text: string): u32 {
  const bytes = utf8(text);
  return proxy_set_buffer_bytes(buffer, start, size, pointer(bytes), bytes.byteLength);
}

// `path` has its parts one behind the other, U+0000 between them.
export function property(path: string): string {
  const bytes = utf8(path);
  status = proxy_get_property(pointer(bytes), bytes.byteLength, answer, answer + 4);
  return status === OK ? take() : "";
}

// The length of a property that is a number.
export function propertySize(path: string): usize {
  const bytes = utf8(path);
  status = proxy_get_property(pointer(bytes), bytes.byteLength, answer, answer + 4);
  if (status !== OK) return 0;
  heap.free(load<usize>(answer));
  return load<usize>(answer, 4);
}

// Names and values in turn, as the ABI has maps.
function encoded(fields: string[]): ArrayBuffer {
  const parts = fields.map<ArrayBuffer>((text) => utf8(text));
  let size = 4;
  for (let index = 0; index < parts.length; index++) size += 5 + parts[index].byteLength;
  const blob = new ArrayBuffer(size);
  let at = pointer(blob);
  store<u32>(at, parts.length / 2);
  at += 4;
  for (let index = 0; index < parts.length; index++) {
    store<u32>(at, parts[index].byteLength);
    at += 4;
  }
  for (let index = 0; index < parts.length; index++) {
    memory.copy(at, pointer(parts[index]), parts[index].byteLength);
    // Memory from the collector is zero, and so is the end of each text.
    at += <usize>parts[index].byteLength + 1;
  }
  return blob;
}

export function respond(code: u32, body: string, fields: string[]): u32 {
  const details = utf8("assemblyscript_guest");
  const text = utf8(body);
  const lines = encoded(fields);
  return proxy_send_local_response(
    code, pointer(details), details.byteLength, pointer(text), text.byteLength, pointer(lines), lines.byteLength, -1,
  );
}

// The call's number, once `status` is OK.
export function call(upstream: string, fields: string[], timeout: u32): u32 {
  const name = utf8(upstream);
  const lines = encoded(fields);
  const none = encoded([]);
  status = proxy_http_call(
    pointer(name), name.byteLength, pointer(lines), lines.byteLength, 0, 0, pointer(none), none.byteLength, timeout,
    answer + 8,
  );
  return load<u32>(answer, 8);
}

// The number to set it with; 0 where it is not there.
let cas: u32 = 0;

export function sharedData(key: string): string | null {
  const name = utf8(key);
  cas = 0;
  if (proxy_get_shared_data(pointer(name), name.byteLength, answer, answer + 4, answer + 8) !== OK) return null;
  cas = load<u32>(answer, 8);
  return take();
}

// Sets what was just read, unless somebody else has done so since.
export function setSharedData(key: string, value: string): u32 {
  const name = utf8(key);
  const text = utf8(value);
  return proxy_set_shared_data(pointer(name), name.byteLength, pointer(text), text.byteLength, cas);
}

export function random(): u32 {
  random_get(answer, 4);
  return load<u32>(answer);
}
