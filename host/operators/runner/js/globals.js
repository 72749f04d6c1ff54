// What an operator finds in its global object: ECMAScript and the web platform (WinterTC's Minimum Common API), nothing else.
(function () {
const { core, primordials } = __bootstrap;
const {
  FunctionPrototype,
  ObjectDefineProperty,
  ObjectGetOwnPropertyDescriptor,
  ObjectSetPrototypeOf,
  RangeError,
  ReflectApply,
  ReflectDeleteProperty,
  ReflectOwnKeys,
  SafeSet,
  SetPrototypeAdd,
  SetPrototypeDelete,
  SetPrototypeGetSize,
  SetPrototypeHas,
  String,
  TypeError,
  indirectEval,
  uncurryThis,
} = primordials;
const { op_operator_log } = core.ops;

const base64 = core.loadExtScript("ext:deno_web/05_base64.js");
const compression = core.loadExtScript("ext:deno_web/14_compression.js");
const consoles = core.loadExtScript("ext:deno_web/01_console.js");
const cryptography = core.loadExtScript("ext:deno_crypto/00_crypto.js");
const encoding = core.loadExtScript("ext:deno_web/08_text_encoding.js");
const event = core.loadExtScript("ext:deno_web/02_event.js");
const exception = core.loadExtScript("ext:deno_web/01_dom_exception.js");
const file = core.loadExtScript("ext:deno_web/09_file.js");
const formdata = core.loadExtScript("ext:deno_fetch/21_formdata.js");
const headers = core.loadExtScript("ext:deno_fetch/20_headers.js");
const messages = core.loadExtScript("ext:deno_web/13_message_port.js");
const performance = core.loadExtScript("ext:deno_web/15_performance.js");
const request = core.loadExtScript("ext:deno_fetch/23_request.js");
const response = core.loadExtScript("ext:deno_fetch/23_response.js");
const signal = core.loadExtScript("ext:deno_web/03_abort_signal.js");
const streams = core.loadExtScript("ext:deno_web/06_streams.js");
const timers = core.loadExtScript("ext:deno_web/02_timers.js");
const url = core.loadExtScript("ext:deno_web/00_url.js");
const webidl = core.loadExtScript("ext:deno_webidl/00_webidl.js");
const urlpattern = core.loadExtScript("ext:deno_web/01_urlpattern.js");
const { packageData } = core.loadExtScript("ext:deno_fetch/22_body.js");
const { fetch } = core.loadExtScript("ext:portcullis/fetch.js");

// Every timer that fires costs a turn of the event loop.
const TIMERS_MAX = 10_000;
const pendingTimers = new SafeSet();

function startTimer(start, once, callback, delay, args) {
  if (SetPrototypeGetSize(pendingTimers) >= TIMERS_MAX) {
    throw new RangeError(`more than ${TIMERS_MAX} timers at once`);
  }
  if (typeof callback !== "function") {
    const text = String(callback);
    callback = () => indirectEval(text);
  }
  let id;
  const run = () => {
    if (once) SetPrototypeDelete(pendingTimers, id);
    ReflectApply(callback, globalThis, args);
  };
  id = start(run, delay);
  SetPrototypeAdd(pendingTimers, id);
  return id;
}

const { clearTimeout } = timers;

function stopTimer(id) {
  id = webidl.converters.long(id);
  clearTimeout(id);
  SetPrototypeDelete(pendingTimers, id);
}

// The log is no terminal.
consoles.setNoColorFns(() => true, () => true);
const console = new consoles.Console((text, level) => op_operator_log(text, level));

class Navigator {
  constructor() {
    throw new TypeError("Illegal constructor");
  }
  get userAgent() {
    return "Portcullis";
  }
}

const classes = {
  __proto__: null,
  AbortController: signal.AbortController,
  AbortSignal: signal.AbortSignal,
  Blob: file.Blob,
  ByteLengthQueuingStrategy: streams.ByteLengthQueuingStrategy,
  CompressionStream: compression.CompressionStream,
  CountQueuingStrategy: streams.CountQueuingStrategy,
  Crypto: cryptography.Crypto,
  CryptoKey: cryptography.CryptoKey,
  CustomEvent: event.CustomEvent,
  DOMException: exception.DOMException,
  DecompressionStream: compression.DecompressionStream,
  ErrorEvent: event.ErrorEvent,
  Event: event.Event,
  EventTarget: event.EventTarget,
  File: file.File,
  FormData: formdata.FormData,
  Headers: headers.Headers,
  MessageChannel: messages.MessageChannel,
  MessageEvent: event.MessageEvent,
  MessagePort: messages.MessagePort,
  Navigator,
  Performance: performance.Performance,
  PerformanceEntry: performance.PerformanceEntry,
  PerformanceMark: performance.PerformanceMark,
  PerformanceMeasure: performance.PerformanceMeasure,
  PerformanceObserver: performance.PerformanceObserver,
  PerformanceObserverEntryList: performance.PerformanceObserverEntryList,
  ProgressEvent: event.ProgressEvent,
  PromiseRejectionEvent: event.PromiseRejectionEvent,
  QuotaExceededError: exception.QuotaExceededError,
  ReadableByteStreamController: streams.ReadableByteStreamController,
  ReadableStream: streams.ReadableStream,
  ReadableStreamBYOBReader: streams.ReadableStreamBYOBReader,
  ReadableStreamBYOBRequest: streams.ReadableStreamBYOBRequest,
  ReadableStreamDefaultController: streams.ReadableStreamDefaultController,
  ReadableStreamDefaultReader: streams.ReadableStreamDefaultReader,
  Request: request.Request,
  Response: response.Response,
  SubtleCrypto: cryptography.SubtleCrypto,
  TextDecoder: encoding.TextDecoder,
  TextDecoderStream: encoding.TextDecoderStream,
  TextEncoder: encoding.TextEncoder,
  TextEncoderStream: encoding.TextEncoderStream,
  TransformStream: streams.TransformStream,
  TransformStreamDefaultController: streams.TransformStreamDefaultController,
  URL: url.URL,
  URLPattern: urlpattern.URLPattern,
  URLSearchParams: url.URLSearchParams,
  WritableStream: streams.WritableStream,
  WritableStreamDefaultController: streams.WritableStreamDefaultController,
  WritableStreamDefaultWriter: streams.WritableStreamDefaultWriter,
};

const functions = {
  __proto__: null,
  atob: base64.atob,
  btoa: base64.btoa,
  clearInterval(id = 0) {
    stopTimer(id);
  },
  clearTimeout(id = 0) {
    stopTimer(id);
  },
  fetch,
  queueMicrotask: globalThis.queueMicrotask,
  reportError: event.reportError,
  setInterval(callback, delay = 0, ...args) {
    return startTimer(timers.setInterval, false, callback, delay, args);
  },
  setTimeout(callback, delay = 0, ...args) {
    return startTimer(timers.setTimeout, true, callback, delay, args);
  },
  structuredClone: messages.structuredClone,
};

// ECMA-262, ECMA-402 and WebAssembly. What V8 or deno_core add beyond them is not there until somebody has thought about it.
const language = [
  "AggregateError", "Array", "ArrayBuffer", "AsyncDisposableStack", "Atomics", "BigInt", "BigInt64Array", "BigUint64Array",
  "Boolean", "DataView", "Date", "DisposableStack", "Error", "EvalError", "FinalizationRegistry", "Float16Array",
  "Float32Array", "Float64Array", "Function", "Infinity", "Int16Array", "Int32Array", "Int8Array", "Intl", "Iterator", "JSON",
  "Map", "Math", "NaN", "Number", "Object", "Promise", "Proxy", "RangeError", "ReferenceError", "Reflect", "RegExp", "Set",
  "String", "SuppressedError", "Symbol", "SyntaxError", "TypeError", "URIError", "Uint16Array", "Uint32Array", "Uint8Array",
  "Uint8ClampedArray", "WeakMap", "WeakRef", "WeakSet", "WebAssembly", "decodeURI", "decodeURIComponent", "encodeURI",
  "encodeURIComponent", "escape", "eval", "globalThis", "isFinite", "isNaN", "parseFloat", "parseInt", "undefined", "unescape",
];

const kept = new SafeSet();
for (let i = 0; i < language.length; i++) SetPrototypeAdd(kept, language[i]);

function define(object, name, value, enumerable) {
  ObjectDefineProperty(object, name, { __proto__: null, value, enumerable, configurable: true, writable: true });
}

function defineGlobals(values, enumerable) {
  const names = ReflectOwnKeys(values);
  for (let i = 0; i < names.length; i++) {
    define(globalThis, names[i], values[names[i]], enumerable);
    SetPrototypeAdd(kept, names[i]);
  }
}

defineGlobals(classes, false);
defineGlobals(functions, true);
defineGlobals({ __proto__: null, console }, false);
defineGlobals(
  { __proto__: null, navigator: { __proto__: Navigator.prototype }, performance: performance.performance, self: globalThis },
  true,
);

ObjectSetPrototypeOf(globalThis, event.EventTarget.prototype);
event.saveGlobalThisReference(globalThis);
event.setEventTargetData(globalThis);
globalThis[webidl.brand] = webidl.brand;
const handlers = ["error", "unhandledrejection", "rejectionhandled"];
for (let i = 0; i < handlers.length; i++) {
  event.defineEventHandler(globalThis, handlers[i]);
  SetPrototypeAdd(kept, "on" + handlers[i]);
}

// In place of the isolate's own functions, which know no `Response`.
function fromResponse(make) {
  return async (source, imports, options) => {
    const inner = response.toInnerResponse(await source);
    if (inner === undefined) throw new TypeError("a `Response`, or a promise of one, is needed");
    if (inner.status < 200 || inner.status > 299) throw new TypeError(`the module was answered with status ${inner.status}`);
    const bytes = inner.body === null ? new Uint8Array() : await inner.body.consume();
    return await make(packageData(bytes, "ArrayBuffer"), imports, options);
  };
}

// deno_core calls its operations with the `call` that functions inherit. Whoever could put another there would be handed the
// operations. A function may still have a `call` of its own.
function keepCall() {
  const { call } = FunctionPrototype;
  ObjectDefineProperty(FunctionPrototype, "call", {
    __proto__: null,
    configurable: false,
    enumerable: false,
    get: () => call,
    set(value) {
      if (this === FunctionPrototype) throw new TypeError("`Function.prototype.call` cannot be replaced");
      define(this, "call", value, true);
    },
  });
}

// What a snapshot cannot hold, and the end of what only a start needs. Runs once, before there is an operator.
function seal() {
  defineGlobals({ __proto__: null, crypto: cryptography.crypto }, true);
  const { Crypto, CryptoKey, SubtleCrypto } = cryptography;
  // Their static functions are for Node's keys, and know nothing of `extractable`.
  const revive = CryptoKey.fromCloneData;
  define(core.getCloneableDeserializers(), "CryptoKey", (data) => revive(data), true);
  const statics = [Crypto, CryptoKey, SubtleCrypto];
  for (let i = 0; i < statics.length; i++) {
    const names = ReflectOwnKeys(statics[i]);
    for (let j = 0; j < names.length; j++) {
      if (names[j] !== "length" && names[j] !== "name" && names[j] !== "prototype") ReflectDeleteProperty(statics[i], names[j]);
    }
  }
  const { WebAssembly } = globalThis;
  // Not there without a compiler (`interpreter_only`).
  if (WebAssembly !== undefined) {
    define(WebAssembly, "compileStreaming", fromResponse(WebAssembly.compile), false);
    define(WebAssembly, "instantiateStreaming", fromResponse(WebAssembly.instantiate), false);
  }
  keepCall();
  performance.setTimeOrigin();
  const names = ReflectOwnKeys(globalThis);
  for (let i = 0; i < names.length; i++) {
    if (typeof names[i] === "string" && !SetPrototypeHas(kept, names[i])) ReflectDeleteProperty(globalThis, names[i]);
  }
}

const dispatchEvent = uncurryThis(event.EventTarget.prototype.dispatchEvent);
const isPrevented = uncurryThis(ObjectGetOwnPropertyDescriptor(event.Event.prototype, "defaultPrevented").get);

// Tells listeners of a rejection that nobody handled; false when one of them took care of it.
function announceRejection(promise, reason) {
  const rejection = new event.PromiseRejectionEvent("unhandledrejection", {
    __proto__: null,
    promise,
    reason,
    cancelable: true,
  });
  dispatchEvent(globalThis, rejection);
  return !isPrevented(rejection);
}

return { announceRejection, seal };
})();
