// Answers requests with the operator's handler. What this file uses it took before the operator's code ran, so that an
// operator that changes a prototype breaks only itself.
(function () {
const { core, primordials } = __bootstrap;
const {
  ArrayBufferIsView,
  ErrorPrototype,
  FunctionPrototypeBind,
  JSONParse,
  MapPrototypeDelete,
  MapPrototypeGet,
  MapPrototypeSet,
  ObjectFreeze,
  ObjectPrototypeIsPrototypeOf,
  ObjectSetPrototypeOf,
  PromisePrototypeThen,
  Proxy,
  PromiseResolve,
  ReflectOwnKeys,
  SafeMap,
  SafeSet,
  SetPrototypeAdd,
  SetPrototypeDelete,
  SetPrototypeGetSize,
  SetPrototypeHas,
  String,
  TypeError,
  TypedArrayPrototypeSlice,
  encodeURIComponent,
} = primordials;
const { op_operator_fail, op_operator_kv, op_operator_log, op_operator_request_headers, op_operator_respond, op_operator_settled } =
  core.ops;
const { InnerBody } = core.loadExtScript("ext:deno_fetch/22_body.js");
const { fromInnerRequest } = core.loadExtScript("ext:deno_fetch/23_request.js");
const { ResponsePrototype, toInnerResponseForDenoServe } = core.loadExtScript("ext:deno_fetch/23_response.js");
const { incomingBody, outgoing } = core.loadExtScript("ext:portcullis/bodies.js");
const { announceRejection, seal } = core.loadExtScript("ext:portcullis/globals.js");

let handler = null;
let env = null;
let dev = false;
let stopping = false;
// By request: what to do when its client goes before there is an answer.
const cancellations = new SafeMap();
// What was handed to `waitUntil` and has not settled.
const pending = new SafeSet();

class Context {
  #requestId;
  constructor(requestId) {
    this.#requestId = requestId;
  }
  get requestId() {
    return this.#requestId;
  }
  waitUntil(promise) {
    const handled = PromisePrototypeThen(PromiseResolve(promise), undefined, log);
    SetPrototypeAdd(pending, handled);
    PromisePrototypeThen(handled, () => {
      SetPrototypeDelete(pending, handled);
      tellIfSettled();
    });
  }
}

// What a `Request` of a client's stands on. The platform's scripts make an object with accessors of its own for each, which costs
// more than all else that they do for a request.
class IncomingRequest {
  #id;
  #url;
  #fields = null;
  redirectMode = "follow";
  redirectCount = 0;
  clientRid = null;
  blobUrlEntry = null;
  constructor(id, method, url, body) {
    this.#id = id;
    this.#url = url;
    this.method = method;
    this.body = body;
  }
  get headerList() {
    if (this.#fields === null) {
      try {
        this.#fields = op_operator_request_headers(this.#id);
      } catch {
        throw new TypeError("the request's fields are gone: it was answered before they were read");
      }
    }
    return this.#fields;
  }
  set headerList(fields) {
    this.#fields = fields;
  }
  url() {
    return this.#url;
  }
  currentUrl() {
    return this.#url;
  }
  // Called when somebody asks for its signal.
  onCancel(then) {
    MapPrototypeSet(cancellations, this.#id, then);
  }
}
// What it lacks is not looked for where an operator could put it.
ObjectSetPrototypeOf(IncomingRequest.prototype, null);

function tellIfSettled() {
  if (stopping && SetPrototypeGetSize(pending) === 0) op_operator_settled();
}

function log(error) {
  op_operator_log(stackOf(error) + "\n", 4);
}

// Every step asks an object of the operator's, and may fail.
function stackOf(error) {
  let text = "an exception that cannot be described";
  try {
    if (!ObjectPrototypeIsPrototypeOf(ErrorPrototype, error)) return "uncaught " + String(error);
    text = String(error);
    text = String(error.stack ?? text);
    return error.cause === undefined ? text : text + "\ncaused by " + stackOf(error.cause);
  } catch {
    return text;
  }
}

function describe(value) {
  return value === null ? "null" : typeof value === "object" ? "an object" : typeof value;
}

// A request begins. `body` is null, the whole body, or undefined for one that is still arriving.
async function dispatch(id, method, url, requestId, body) {
  try {
    // Travels with every promise and timer, so that CPU time can be charged to the request that uses it.
    core.setAsyncContext(id);
    const inner = new IncomingRequest(
      id,
      method,
      url,
      body === undefined ? incomingBody(id) : body === null ? null : new InnerBody({ body, consumed: false }),
    );
    answer(id, await handler(fromInnerRequest(inner, "immutable"), env, new Context(requestId)));
  } catch (error) {
    fail(id, error);
  }
}

function answer(id, response) {
  if (!ObjectPrototypeIsPrototypeOf(ResponsePrototype, response)) {
    throw new TypeError("`fetch` must return a `Response`, but it returned " + describe(response));
  }
  const inner = toInnerResponseForDenoServe(response);
  if (inner.status < 200 || inner.status > 599) throw new TypeError(`a response with status ${inner.status} cannot be sent`);
  const body = inner.body;
  if (body === null) {
    op_operator_respond(id, inner.status, inner.headerList, null);
  } else {
    if (body.unusable()) throw new TypeError("the response's body was used already");
    const held = body.streamOrStatic;
    if (held.body !== undefined) {
      held.consumed = true;
      op_operator_respond(id, inner.status, inner.headerList, held.body);
    } else {
      op_operator_respond(id, inner.status, inner.headerList, undefined);
      PromisePrototypeThen(outgoing(id, body.stream), undefined, log);
    }
  }
  MapPrototypeDelete(cancellations, id);
}

// The client learns nothing but the status; the log gets the stack.
function fail(id, error) {
  const stack = stackOf(error);
  op_operator_log(stack + "\n", 4);
  MapPrototypeDelete(cancellations, id);
  op_operator_fail(id, dev ? stack : null);
}

function gone(id) {
  const then = MapPrototypeGet(cancellations, id);
  if (then === undefined) return;
  MapPrototypeDelete(cancellations, id);
  then();
}

class Files {
  #contents;
  constructor(contents) {
    this.#contents = contents;
  }
  bytes(name) {
    const contents = this.#contents[name];
    if (contents === undefined) throw new TypeError(`needs read ${name}; add it to the operator's \`read\` list`);
    return TypedArrayPrototypeSlice(contents);
  }
  text(name) {
    return core.decode(this.bytes(name));
  }
  names() {
    return ReflectOwnKeys(this.#contents);
  }
}

async function keyValue(method, path, value) {
  const { 0: refusal, 1: bytes } = await op_operator_kv(method, path, value);
  if (refusal !== null) throw new TypeError(refusal);
  return bytes;
}

function keyPath(key) {
  return "/kv/" + encodeURIComponent(key);
}

class KeyValueStore {
  async get(key) {
    const bytes = await keyValue("GET", keyPath(key), null);
    return bytes === null ? null : core.decode(bytes);
  }
  async getBytes(key) {
    return await keyValue("GET", keyPath(key), null);
  }
  async put(key, value) {
    await keyValue("PUT", keyPath(key), ArrayBufferIsView(value) ? value : core.encode(String(value)));
  }
  async delete(key) {
    await keyValue("DELETE", keyPath(key), null);
  }
  async list(prefix = "") {
    return JSONParse(core.decode(await keyValue("GET", "/kv?prefix=" + encodeURIComponent(prefix), null)));
  }
}

// While developing, whoever asks for what was not granted is told once how to grant it.
function told(granted) {
  const asked = new SafeSet();
  return new Proxy(granted, {
    __proto__: null,
    get(target, name) {
      if (typeof name === "string" && !(name in target) && !SetPrototypeHas(asked, name)) {
        SetPrototypeAdd(asked, name);
        const grant = name === "kv" ? "`kv: true`" : name === "files" ? "`read: [FILE]`" : `\`${name}\` to \`env\` or \`secrets\``;
        op_operator_log(`\`env.${name}\` is not there: add ${grant} in its \`permissions\``, 3);
      }
      return target[name];
    },
  });
}

// Called once when the process starts: no operator yet.
function start() {
  seal();
  core.setUnhandledPromiseRejectionHandler((promise, reason) => {
    if (announceRejection(promise, reason)) log(reason);
    return true;
  });
}

// Called before the operator's module is evaluated. `values` and `files` alternate names and contents.
function prepare(values, files, withStore, develops) {
  env = { __proto__: null };
  for (let i = 0; i < values.length; i += 2) env[values[i]] = values[i + 1];
  if (withStore) env.kv = ObjectFreeze(new KeyValueStore());
  if (files.length > 0) {
    const contents = { __proto__: null };
    for (let i = 0; i < files.length; i += 2) contents[files[i]] = files[i + 1];
    env.files = ObjectFreeze(new Files(contents));
  }
  ObjectFreeze(env);
  dev = develops;
  if (dev) env = told(env);
}

// Called with the default export of the operator's module.
function adopt(operator) {
  if (operator === null || typeof operator !== "object" || typeof operator.fetch !== "function") {
    throw new TypeError("the entry module needs `export default { async fetch(request, env, ctx) { ... } }`");
  }
  handler = FunctionPrototypeBind(operator.fetch, operator);
}

// Called when the process is asked to end.
function stop() {
  stopping = true;
  tellIfSettled();
}

return { adopt, dispatch, gone, prepare, start, stop };
})();
