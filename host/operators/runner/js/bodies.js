// Bodies between an operator's streams and the process: read piece by piece, written no faster than they are taken.
(function () {
const { core, primordials } = __bootstrap;
const { PromisePrototypeThen, TypeError, TypedArrayPrototypeGetSymbolToStringTag, uncurryThis } = primordials;
const { op_operator_body_read, op_operator_body_cancel, op_operator_body_write, op_operator_body_room, op_operator_body_end } = core.ops;
const { ReadableStream, ReadableStreamDefaultReader } = core.loadExtScript("ext:deno_web/06_streams.js");
const { InnerBody } = core.loadExtScript("ext:deno_fetch/22_body.js");

// Taken now: an operator may change the prototypes later.
const getReader = uncurryThis(ReadableStream.prototype.getReader);
const read = uncurryThis(ReadableStreamDefaultReader.prototype.read);
const cancel = uncurryThis(ReadableStreamDefaultReader.prototype.cancel);

function ignore() {}

// The stream of a body that arrives at this process.
function incoming(id) {
  return new ReadableStream({
    __proto__: null,
    type: "bytes",
    async pull(controller) {
      const chunk = await op_operator_body_read(id);
      if (chunk === null) {
        controller.close();
        // A reader with a buffer of its own waits for this.
        controller.byobRequest?.respond(0);
      } else {
        controller.enqueue(chunk);
      }
    },
    cancel() {
      op_operator_body_cancel(id);
    },
  }, { __proto__: null, highWaterMark: 0 });
}

function incomingBody(id) {
  return new InnerBody(incoming(id));
}

// Sends a stream out. The other side may go at any time; then the stream is cancelled.
async function outgoing(id, stream) {
  let reader;
  try {
    reader = getReader(stream);
    for (;;) {
      const { value, done } = await read(reader);
      if (done) break;
      if (TypedArrayPrototypeGetSymbolToStringTag(value) !== "Uint8Array") {
        throw new TypeError("a body's stream must yield `Uint8Array`s");
      }
      if (!op_operator_body_write(id, value) && !(await op_operator_body_room(id))) {
        PromisePrototypeThen(cancel(reader, new TypeError("nobody reads the body any more")), ignore, ignore);
        return;
      }
    }
    op_operator_body_end(id, true);
  } catch (error) {
    op_operator_body_end(id, false);
    if (reader !== undefined) PromisePrototypeThen(cancel(reader, error), ignore, ignore);
    throw error;
  }
}

return { ignore, incomingBody, outgoing };
})();
