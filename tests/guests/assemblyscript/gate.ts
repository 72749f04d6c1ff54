// A gate such as plugins in AssemblyScript are: it wants a key, asks another server about some, reads bodies, and counts what
// it denies. Each callback is told, in the form that the differential suite reads; the same gate in Go and C++ lies beside,
// the one in Go says what its fields mean.
import {
  CALL_BODY, CALL_HEADERS, CONFIGURATION, GO_ON, OK, REQUEST_BODY, REQUEST_HEADERS, RESPONSE_BODY, RESPONSE_HEADERS, STOP,
  VM_CONFIGURATION, addField, buffer, call, continueStream, field, log, property, propertySize, random, removeField, respond,
  setBuffer, setEffectiveContext, setSharedData, setTickPeriod, sharedData, status,
} from "./abi";

class Gate {
  row: string = "";
  key: string = "";
  edit: bool = false;
  // The body is read to its end before anything goes on.
  holding: bool = false;
}

// Made by the module's `start` section, before the host has called anything.
const gates = new Map<u32, Gate>();
const calls = new Map<u32, u32>();
// The rows of root contexts, and how often each has ticked.
const roots = new Map<u32, string>();
const ticks = new Map<u32, u32>();
// Tells the VMs of a host apart.
let instance: u32 = 0;

function tell(row: string, line: string): void {
  if (row.length > 0) log("@" + row + "@" + line);
}

function tellRoot(root: u32, line: string): void {
  if (roots.has(root)) tell(roots.get(root), line);
}

function slug(row: string): string {
  return row.replaceAll("/", "-").replaceAll("_", "-");
}

// Counts in shared data, where all VMs count together.
function countDenied(row: string): void {
  const key = "denied/" + row;
  while (true) {
    const value = sharedData(key);
    const next = ((value === null ? 0 : <i32>parseInt(value)) + 1).toString();
    if (setSharedData(key, next) === OK) return tell(row, "  denied " + next);
  }
}

export function proxy_abi_version_0_2_0(): void {}

export function malloc(size: usize): usize {
  return heap.alloc(size);
}

export function proxy_on_context_create(id: u32, parent: u32): void {
  if (parent !== 0) gates.set(id, new Gate());
}

export function proxy_on_vm_start(_root: u32, _size: u32): u32 {
  return 1;
}

export function proxy_on_configure(root: u32, size: u32): u32 {
  const text = buffer(CONFIGURATION, size);
  if (status !== OK || text == "refuse") {
    log("the gate in AssemblyScript was told to refuse");
    return 0;
  }
  if (instance === 0) instance = random();
  if (text.startsWith("row: ")) roots.set(root, text.split("\n")[0].substring(5) + "#" + instance.toString());
  const vm = buffer(VM_CONFIGURATION, 100);
  tellRoot(root, "configure(" + size.toString() + ") for " + status.toString() + " " + vm);
  setTickPeriod(20);
  return 1;
}

export function proxy_on_tick(root: u32): void {
  tellRoot(root, "tick");
  const count: u32 = ticks.has(root) ? ticks.get(root) + 1 : 1;
  ticks.set(root, count);
  if (count === 2) {
    setTickPeriod(0);
    tellRoot(root, "ticked");
  }
}

export function proxy_on_request_headers(id: u32, count: u32, end: u32): u32 {
  const gate = gates.get(id);
  const script = field(REQUEST_HEADERS, "x-calls");
  if (script !== null) {
    gate.row = script.split(";")[0].substring(5);
    tell(gate.row, "context_create()");
  }
  tell(gate.row, "request_headers(" + count.toString() + ", " + end.toString() + ")");
  const path = property("request\0path");
  tell(gate.row, "  path " + status.toString() + " " + path);
  tell(gate.row, "  x-absent " + (field(REQUEST_HEADERS, "x-absent") === null ? "false" : "true"));
  const edit = field(REQUEST_HEADERS, "x-edit");
  gate.edit = edit !== null && edit == "yes";
  const key = field(REQUEST_HEADERS, "x-key");
  if (key === null) {
    countDenied(gate.row);
    const answered = respond(401, "no key", ["www-authenticate", "Key", "x-by", "assemblyscript"]);
    tell(gate.row, "  respond " + answered.toString());
    return STOP;
  }
  gate.key = key;
  // As in other languages, what a program cannot go on with ends it.
  if (key == "throw") throw new Error("told to");
  removeField(REQUEST_HEADERS, "x-key");
  addField(REQUEST_HEADERS, "x-checked-by", "assemblyscript");
  if (key == "ask") {
    const where = "/" + slug(gate.row);
    const asked = call("callee", [":method", "GET", ":path", where, ":authority", "callee.example"], 1000);
    tell(gate.row, "  call " + status.toString());
    calls.set(asked, id);
    return STOP;
  }
  if (end === 0) {
    gate.holding = true;
    return STOP;
  }
  return GO_ON;
}

export function proxy_on_request_body(id: u32, size: u32, end: u32): u32 {
  const gate = gates.get(id);
  tell(gate.row, "request_body(" + size.toString() + ", " + end.toString() + ")");
  if (!gate.holding) return GO_ON;
  if (end === 0) return STOP;
  const body = buffer(REQUEST_BODY, size);
  tell(gate.row, "  body " + status.toString() + " " + body);
  if (body.includes("evil")) {
    countDenied(gate.row);
    tell(gate.row, "  respond " + respond(403, "evil", ["x-by", "assemblyscript"]).toString());
    return STOP;
  }
  tell(gate.row, "  add " + addField(REQUEST_HEADERS, "x-read", size.toString()).toString());
  return GO_ON;
}

export function proxy_on_http_call_response(_root: u32, asked: u32, count: u32, bodySize: u32, trailers: u32): void {
  if (!calls.has(asked)) return;
  const id = calls.get(asked);
  calls.delete(asked);
  if (!gates.has(id)) return;
  const gate = gates.get(id);
  const code = field(CALL_HEADERS, ":status");
  const said = code === null ? "" : code;
  const body = buffer(CALL_BODY, bodySize);
  const counts = count.toString() + ", " + bodySize.toString() + ", " + trailers.toString();
  tell(gate.row, "http_call_response(" + counts + ")");
  tell(gate.row, "  answer " + said + " " + body);
  tell(gate.row, "  context " + setEffectiveContext(id).toString());
  if (said == "200") return tell(gate.row, "  continue " + continueStream(0).toString());
  countDenied(gate.row);
  tell(gate.row, "  respond " + respond(403, "the callee says " + said, ["x-by", "assemblyscript"]).toString());
}

export function proxy_on_response_headers(id: u32, count: u32, end: u32): u32 {
  const gate = gates.get(id);
  tell(gate.row, "response_headers(" + count.toString() + ", " + end.toString() + ")");
  addField(RESPONSE_HEADERS, "x-gate", "assemblyscript");
  if (gate.edit) removeField(RESPONSE_HEADERS, "content-length");
  return GO_ON;
}

export function proxy_on_response_body(id: u32, size: u32, end: u32): u32 {
  const gate = gates.get(id);
  tell(gate.row, "response_body(" + size.toString() + ", " + end.toString() + ")");
  if (gate.edit && buffer(RESPONSE_BODY, size).startsWith("secret")) {
    tell(gate.row, "  set " + setBuffer(RESPONSE_BODY, 0, 6, "[hidden]").toString());
  }
  return GO_ON;
}

export function proxy_on_log(id: u32): void {
  const size = propertySize("response\0code");
  tell(gates.get(id).row, "log() code " + status.toString() + " " + size.toString());
}

export function proxy_on_done(id: u32): u32 {
  if (gates.has(id)) tell(gates.get(id).row, "done()");
  return 1;
}

export function proxy_on_delete(id: u32): void {
  if (!gates.has(id)) return;
  tell(gates.get(id).row, "delete()");
  tell(gates.get(id).row, "end");
  gates.delete(id);
}
