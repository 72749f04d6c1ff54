// The trusted half of an operator's process, for the stock `deno` binary.
//
// It listens, gives up what it can give up, takes the operator's code from the host and answers requests with it. It
// shares a realm with the operator, so it holds nothing worth stealing: every rule is enforced by the host, outside
// this process. What it takes from the global object it takes before the operator's code runs, so that an operator that
// changes a prototype breaks only itself.
//
// Deno loads much of what is global at the first use: timers take 5 ms. A process that is started for a request that
// waits loads what it needs and no more; one that is kept ready is rehearsed.

const { Blob, Headers, Object, Promise, Proxy, Request, Response, Set, TypeError, URL, Uint8Array, String, console } = globalThis;
const { encodeURIComponent } = globalThis;
const nativeFetch = globalThis.fetch;
const runtime = globalThis.Deno;
const [operatorSocket, hostSocket] = runtime.args;
const INTERNAL = "http://portcullis.internal";
const REDIRECTS_MAX = 10;

let madeClient;
// Its permission for the host's socket is one that stays.
function client() {
  return madeClient ??= runtime.createHttpClient({ proxy: { transport: "unix", path: hostSocket } });
}

let handler = null;
let env = null;
let dev = false;
const pending = new Set();

runtime.serve({ path: operatorSocket, onListen: ready, onError: exception }, (request) => {
  const url = request.url;
  if (url.startsWith(INTERNAL)) return control(request, url.slice(INTERNAL.length));
  return answer(request);
});

async function answer(request) {
  if (handler === null) return new Response(null, { status: 503 });
  let response;
  try {
    response = await handler(request, env, new Context(request));
  } catch (error) {
    return exception(error);
  }
  if (!(response instanceof Response)) {
    return exception(new TypeError("`fetch` must return a `Response`, but it returned " + describe(response)));
  }
  return response;
}

class Context {
  #request;
  constructor(request) {
    this.#request = request;
  }
  get requestId() {
    return this.#request.headers.get("x-request-id");
  }
  waitUntil(promise) {
    const settled = Promise.resolve(promise).then(undefined, (error) => console.error(error)).then(() => {
      pending.delete(settled);
    });
    pending.add(settled);
  }
}

function describe(value) {
  return value === null ? "null" : typeof value === "object" ? "an object" : typeof value;
}

function stackOf(error) {
  try {
    const text = error instanceof Error ? String(error.stack ?? error) : "uncaught " + String(error);
    return error?.cause === undefined ? text : text + "\ncaused by " + stackOf(error.cause);
  } catch {
    return "an exception that cannot be described";
  }
}

// The client learns nothing but the status; the log gets the stack. The host replaces positions by those of the source.
function exception(error) {
  const stack = stackOf(error);
  console.error(stack);
  return new Response(dev ? stack : null, {
    status: 500,
    headers: { "x-portcullis-outcome": "exception", "content-type": "text/plain; charset=utf-8" },
  });
}

async function control(request, path) {
  if (path === "/ping") {
    // Before there is code it is asked only where nobody waits.
    if (handler === null) await rehearse();
    return new Response(null, { status: 204 });
  }
  if (path !== "/load" || handler !== null) return new Response(null, { status: 404 });
  try {
    await load(await request.json());
    return Response.json({});
  } catch (error) {
    return Response.json({ message: String(error?.message ?? error), stack: stackOf(error) }, { status: 422 });
  }
}

async function load(document) {
  env = Object.create(null);
  for (const [name, value] of Object.entries(document.env)) env[name] = value;
  if (document.kv) env.kv = Object.freeze(new KeyValueStore());
  const files = Object.create(null);
  for (const [name, value] of Object.entries(document.files)) files[name] = Uint8Array.from(globalThis.atob(value), (c) => c.charCodeAt(0));
  if (Object.keys(files).length > 0) env.files = Object.freeze(new Files(files));
  Object.freeze(env);
  dev = document.dev;
  if (dev) env = told(env);
  const url = URL.createObjectURL(new Blob([document.code], { type: "text/javascript" }));
  const module = await import(url);
  URL.revokeObjectURL(url);
  const operator = module.default;
  if (operator === null || typeof operator !== "object" || typeof operator.fetch !== "function") {
    throw new TypeError("the entry module needs `export default { async fetch(request, env, ctx) { ... } }`");
  }
  handler = operator.fetch.bind(operator);
}

// Does once what code and requests will need: a process that is kept ready answers its first request sooner then.
async function rehearse() {
  const code = "export default { fetch: (request) => Response.json({ path: new URL(request.url).pathname }) };";
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  const module = await import(url);
  URL.revokeObjectURL(url);
  await module.default.fetch(new Request("http://portcullis.invalid/", { method: "POST", body: "x" })).json();
  client();
  // Loads them.
  for (const name of ["setTimeout", "atob", "crypto", "TextDecoder", "AbortController", "TransformStream"]) void globalThis[name];
}

// Steps of a tenth of a millisecond: finer ones tell what else the machine's caches and cores are doing. Without a second
// thread there is no finer clock to be made of shared memory.
function coarsenClocks() {
  const STEP = 0.1;
  const { Performance, performance, Event, Temporal, Date, Math } = globalThis;
  const now = performance.now.bind(performance);
  const coarse = () => Math.floor(now() / STEP) * STEP;
  Object.defineProperty(Performance.prototype, "now", { value: function now() { return coarse(); }, writable: true, configurable: true });
  Object.defineProperty(Event.prototype, "timeStamp", { get: coarse, configurable: true });
  for (const name of ["mark", "measure", "getEntries", "getEntriesByName", "getEntriesByType"]) delete Performance.prototype[name];
  for (const name of ["PerformanceObserver", "PerformanceObserverEntryList", "PerformanceEntry", "PerformanceMark", "PerformanceMeasure"]) delete globalThis[name];
  if (Temporal === undefined) return;
  const { Instant, Now } = Temporal;
  const zone = Now.timeZoneId.bind(Now);
  const milliseconds = Date.now;
  const instant = () => Instant.fromEpochMilliseconds(milliseconds());
  const zoned = (timeZone = zone()) => instant().toZonedDateTimeISO(timeZone);
  Object.assign(Now, {
    instant,
    zonedDateTimeISO: zoned,
    plainDateTimeISO: (timeZone) => zoned(timeZone).toPlainDateTime(),
    plainDateISO: (timeZone) => zoned(timeZone).toPlainDate(),
    plainTimeISO: (timeZone) => zoned(timeZone).toPlainTime(),
  });
}

// While developing, whoever asks for what was not granted is told once how to grant it.
function told(granted) {
  const asked = new Set();
  return new Proxy(granted, {
    get(target, name) {
      if (typeof name === "string" && !(name in target) && !asked.has(name)) {
        asked.add(name);
        const grant = name === "kv" ? "`kv: true`" : name === "files" ? "`read: [FILE]`" : `\`${name}\` to \`env\` or \`secrets\``;
        console.warn(`\`env.${name}\` is not there: add ${grant} in its \`permissions\``);
      }
      return target[name];
    },
  });
}

class Files {
  #contents;
  constructor(contents) {
    this.#contents = contents;
  }
  bytes(name) {
    const contents = this.#contents[name];
    if (contents === undefined) throw new TypeError(`needs read ${name}; add it to the operator's \`read\` list`);
    return contents.slice();
  }
  text(name) {
    return new TextDecoder().decode(this.bytes(name));
  }
  names() {
    return Object.keys(this.#contents);
  }
}

class KeyValueStore {
  async get(key) {
    const response = await service("GET", "/kv/" + encodeURIComponent(key));
    if (response.status === 404) {
      await response.body?.cancel();
      return null;
    }
    return await response.text();
  }
  async getBytes(key) {
    const response = await service("GET", "/kv/" + encodeURIComponent(key));
    if (response.status === 404) {
      await response.body?.cancel();
      return null;
    }
    return new Uint8Array(await response.arrayBuffer());
  }
  async put(key, value) {
    await (await service("PUT", "/kv/" + encodeURIComponent(key), value)).text();
  }
  async delete(key) {
    await (await service("DELETE", "/kv/" + encodeURIComponent(key))).text();
  }
  async list(prefix = "") {
    return await (await service("GET", "/kv?prefix=" + encodeURIComponent(prefix))).json();
  }
}

async function service(method, path, body) {
  return await refuse(await nativeFetch(INTERNAL + path, { method, body, client: client() }));
}

async function refuse(response) {
  if (response.headers.get("x-portcullis-refused") === null) return response;
  throw new TypeError(await response.text());
}

// Goes through the host, which decides, resolves, connects, encrypts and puts secrets in.
async function hostFetch(input, init) {
  let request = new Request(input, init);
  if (!/^https?:/.test(request.url)) {
    if (/^(data|blob):/.test(request.url)) return await nativeFetch(request);
    throw new TypeError(`\`${new URL(request.url).protocol}\` addresses cannot be fetched`);
  }
  for (let redirects = 0; ; redirects++) {
    const url = request.url;
    const headers = new Headers(request.headers);
    headers.set("x-portcullis-url", url);
    const response = await refuse(
      await nativeFetch(INTERNAL + "/fetch", {
        method: request.method,
        headers,
        body: request.body,
        redirect: "manual",
        signal: request.signal,
        client: client(),
      }),
    );
    const location = [301, 302, 303, 307, 308].includes(response.status) ? response.headers.get("location") : null;
    if (location === null || request.redirect === "manual") {
      Object.defineProperty(response, "url", { value: url });
      Object.defineProperty(response, "redirected", { value: redirects > 0 });
      return response;
    }
    await response.body?.cancel();
    if (request.redirect === "error") throw new TypeError(`\`${url}\` answered with a redirect`);
    if (redirects >= REDIRECTS_MAX) throw new TypeError(`more than ${REDIRECTS_MAX} redirects`);
    request = redirected(request, new URL(location, url), response.status);
  }
}

function redirected(request, target, status) {
  const headers = new Headers(request.headers);
  // A credential for one origin is not for another.
  if (target.origin !== new URL(request.url).origin) {
    for (const name of ["authorization", "cookie", "proxy-authorization"]) headers.delete(name);
  }
  const toGet = status === 303 ? !["GET", "HEAD"].includes(request.method) : status < 303 && request.method === "POST";
  if (!toGet && request.body !== null) throw new TypeError("a redirect asks for a request body that was sent already");
  for (const name of toGet ? ["content-type", "content-length", "content-encoding"] : []) headers.delete(name);
  return new Request(target, {
    method: toGet ? "GET" : request.method,
    headers,
    redirect: request.redirect,
    signal: request.signal,
  });
}

function ready() {
  // From here on nothing of the machine is granted but the host's own services.
  const revoked = [
    { name: "net", host: "unix:" + operatorSocket },
    { name: "read", path: operatorSocket },
    { name: "write", path: operatorSocket },
    { name: "env" },
    { name: "run" },
    { name: "ffi" },
    { name: "sys" },
    { name: "import" },
  ];
  for (const descriptor of revoked) runtime.permissions.revokeSync(descriptor);
  runtime.addSignalListener("SIGTERM", async () => {
    await Promise.allSettled([...pending]);
    runtime.exit(0);
  });
  globalThis.addEventListener("unhandledrejection", (event) => {
    event.preventDefault();
    console.error(stackOf(event.reason));
  });
  globalThis.addEventListener("error", (event) => {
    event.preventDefault();
    console.error(stackOf(event.error));
  });
  globalThis.fetch = hostFetch;
  coarsenClocks();
  // Not part of the contract. Deleting a name is tidiness, not defence: what must not work fails in the jail.
  const absent = [
    "Deno", "Worker", "SharedArrayBuffer", "localStorage", "sessionStorage", "caches", "WebSocket", "EventSource",
    "process", "Buffer", "global", "alert", "confirm", "prompt", "close", "GPU", "onload", "onunload",
  ];
  for (const name of absent) delete globalThis[name];
  runtime.stdout.writeSync(new TextEncoder().encode("\u001eportcullis ready\n"));
}
