// `fetch`: hands every request to the host, which decides, resolves, connects, encrypts and puts secrets in.
(function () {
const { core, primordials } = __bootstrap;
const {
  ArrayPrototypeFilter,
  ArrayPrototypePush,
  ObjectGetOwnPropertyDescriptor,
  PromisePrototypeThen,
  StringPrototypeStartsWith,
  StringPrototypeToLowerCase,
  TypeError,
  uncurryThis,
} = primordials;
const { op_operator_call, op_operator_call_abort, op_operator_data_url, op_operator_fetch } = core.ops;
const webidl = core.loadExtScript("ext:deno_webidl/00_webidl.js");
const { URL } = core.loadExtScript("ext:deno_web/00_url.js");
const { AbortSignal, add, remove } = core.loadExtScript("ext:deno_web/03_abort_signal.js");
const { DecompressionStream } = core.loadExtScript("ext:deno_web/14_compression.js");
const { ReadableStream } = core.loadExtScript("ext:deno_web/06_streams.js");
const { InnerBody } = core.loadExtScript("ext:deno_fetch/22_body.js");
const { Request, toInnerRequest } = core.loadExtScript("ext:deno_fetch/23_request.js");
const { Response, fromInnerResponse, newInnerResponse, nullBodyStatus, redirectStatus } = core.loadExtScript(
  "ext:deno_fetch/23_response.js",
);
const { ignore, incomingBody, outgoing } = core.loadExtScript("ext:portcullis/bodies.js");

const REDIRECTS_MAX = 10;

function getterOf(prototype, name) {
  return uncurryThis(ObjectGetOwnPropertyDescriptor(prototype, name).get);
}
const signalOf = getterOf(Request.prototype, "signal");
const isAborted = getterOf(AbortSignal.prototype, "aborted");
const reasonOf = getterOf(AbortSignal.prototype, "reason");
const hrefOf = getterOf(URL.prototype, "href");
const originOf = getterOf(URL.prototype, "origin");
const protocolOf = getterOf(URL.prototype, "protocol");
const pipeThrough = uncurryThis(ReadableStream.prototype.pipeThrough);

function fetch(input, init = undefined) {
  return send(arguments.length, input, init);
}

async function send(given, input, init) {
  webidl.requiredArguments(given, 1, "Failed to execute 'fetch'");
  const request = new Request(input, init);
  const signal = signalOf(request);
  if (isAborted(signal)) throw reasonOf(signal);
  const inner = toInnerRequest(request);
  const url = inner.url();
  if (StringPrototypeStartsWith(url, "data:")) {
    const found = op_operator_data_url(url);
    if (found === null) throw new TypeError("the `data:` address cannot be read");
    return new Response(found[1], { __proto__: null, headers: [["content-type", found[0]]] });
  }
  if (StringPrototypeStartsWith(url, "blob:")) {
    if (inner.blobUrlEntry === null) throw new TypeError("there is no blob at this address");
    return new Response(inner.blobUrlEntry);
  }
  if (!isHttp(url)) throw new TypeError(`\`${protocolOf(new URL(url))}\` addresses cannot be fetched`);
  return await overHttp(inner, url, signal);
}

function isHttp(url) {
  return StringPrototypeStartsWith(url, "http:") || StringPrototypeStartsWith(url, "https:");
}

async function overHttp(inner, first, signal) {
  let url = first;
  let method = inner.method;
  let headers = ArrayPrototypeFilter(inner.headerList, () => true);
  let body = inner.body;
  const urls = [url];
  for (;;) {
    const answer = await one(method, url, headers, body, signal);
    const location = redirectStatus(answer.status) ? fieldOf(answer.headers, "location") : null;
    if (location === null || inner.redirectMode === "manual") return toResponse(answer, urls, signal);
    if (answer.body !== null) PromisePrototypeThen(discard(answer.body), ignore, ignore);
    if (inner.redirectMode === "error") throw new TypeError(`\`${url}\` answered with a redirect`);
    if (urls.length > REDIRECTS_MAX) throw new TypeError(`more than ${REDIRECTS_MAX} redirects`);
    const target = new URL(location, url);
    const next = hrefOf(target);
    if (!isHttp(next)) throw new TypeError(`\`${protocolOf(target)}\` addresses cannot be fetched`);
    const drops = ["host"];
    // A credential for one origin is not for another.
    if (originOf(target) !== originOf(new URL(url))) ArrayPrototypePush(drops, "authorization", "cookie", "proxy-authorization");
    const toGet = answer.status === 303 ? method !== "GET" && method !== "HEAD" : answer.status < 303 && method === "POST";
    if (toGet) {
      method = "GET";
      body = null;
      ArrayPrototypePush(drops, "content-type", "content-length", "content-encoding", "content-language", "content-location");
    } else if (body !== null && body.source === null) {
      throw new TypeError("a redirect asks for a request body that was sent already");
    }
    headers = ArrayPrototypeFilter(headers, (field) => !isOneOf(drops, StringPrototypeToLowerCase(field[0])));
    url = next;
    ArrayPrototypePush(urls, url);
  }
}

function isOneOf(names, name) {
  for (let i = 0; i < names.length; i++) if (names[i] === name) return true;
  return false;
}

function fieldOf(headers, name) {
  for (let i = 0; i < headers.length; i++) if (headers[i][0] === name) return headers[i][1];
  return null;
}

function discard(body) {
  return body.cancel();
}

// One request, no redirects.
async function one(method, url, headers, body, signal) {
  const call = op_operator_call();
  const abort = () => op_operator_call_abort(call);
  signal[add](abort);
  try {
    let bytes = null;
    let stream = -1;
    if (body !== null) {
      const held = body.streamOrStatic;
      if (held.body === undefined) {
        if (body.unusable()) throw new TypeError("the request's body was used already");
        stream = call;
      } else {
        // Kept for a redirect that asks for it again.
        bytes = held.body;
      }
    }
    const answered = op_operator_fetch(call, method, url, headers, bytes, stream >= 0);
    if (stream >= 0) PromisePrototypeThen(outgoing(stream, body.stream), ignore, ignore);
    const { 0: refusal, 1: status, 2: fields, 3: incoming } = await answered;
    if (isAborted(signal)) throw reasonOf(signal);
    if (refusal !== null) throw new TypeError(refusal);
    return { __proto__: null, status, headers: fields, body: incoming < 0 ? null : incomingBody(incoming) };
  } catch (error) {
    throw isAborted(signal) ? reasonOf(signal) : error;
  } finally {
    signal[remove](abort);
  }
}

function toResponse(answer, urls, signal) {
  const inner = newInnerResponse(answer.status, "");
  inner.headerList = answer.headers;
  inner.urlList = urls;
  if (answer.body !== null && !nullBodyStatus(answer.status)) {
    inner.body = answer.body;
    const stream = inner.body.stream;
    signal[add](() => inner.body.error(reasonOf(signal)));
    const format = formatOf(fieldOf(answer.headers, "content-encoding"));
    if (format !== null) {
      inner.body = new InnerBody(pipeThrough(stream, new DecompressionStream(format)));
      inner.bodyDecoded = true;
    }
  }
  return fromInnerResponse(inner, "immutable");
}

function formatOf(encoding) {
  switch (encoding === null ? "" : StringPrototypeToLowerCase(encoding)) {
    case "gzip":
    case "x-gzip":
      return "gzip";
    case "deflate":
      return "deflate";
    case "br":
      return "brotli";
    default:
      return null;
  }
}

return { fetch };
})();
