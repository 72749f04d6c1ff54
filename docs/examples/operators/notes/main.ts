// Notes of each customer, in the operator's own store. The filter before it says who asks.
import type { Env } from "../operator.d.ts";
import { problem } from "../problem.ts";

export default {
  async fetch(request: Request, env: Env): Promise<Response> {
    const customer = request.headers.get("x-portcullis-sub") ?? "nobody";
    const id = new URL(request.url).pathname.split("/")[2] ?? "";
    const store = env.kv!;
    if (id === "") {
      const keys = await store.list(`${customer}/`);
      return Response.json({ customer, notes: keys.map((key) => key.slice(customer.length + 1)) });
    }
    const key = `${customer}/${id}`;
    switch (request.method) {
      case "GET": {
        const text = await store.get(key);
        return text === null ? problem(404, "there is no such note") : Response.json({ id, text });
      }
      case "PUT":
        await store.put(key, await request.text());
        return Response.json({ id }, { status: 201 });
      case "DELETE":
        await store.delete(key);
        return new Response(null, { status: 204 });
      default:
        return problem(405, "notes are read, written and deleted");
    }
  },
};
