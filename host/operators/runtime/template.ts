import type { Context, Env } from "./operator.d.ts";

export default {
  async fetch(request: Request, env: Env, ctx: Context): Promise<Response> {
    const url = new URL(request.url);
    console.log(request.method, url.pathname);
    return Response.json({ hello: url.searchParams.get("name") ?? "world" });
  },
};
