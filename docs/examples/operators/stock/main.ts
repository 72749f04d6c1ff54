// How many of an item are left, as the warehouse's API says. The key for that API is put in by the host on the way:
// `env.WAREHOUSE_KEY` is only a mark.
//
// Two mistakes are left in on purpose: a client may say which server is asked, and may search with a regular expression of
// its own. Neither gets out: the first is refused the network, the second is ended when its CPU time is over.
import type { Env } from "../operator.d.ts";
import { problem } from "../problem.ts";

const DESCRIPTIONS: Record<string, string> = {
  lamp: "a lamp of brass with a shade of linen, wired by hand",
  chair: "a chair of oak with a seat of woven cane",
};

export default {
  async fetch(request: Request, env: Env): Promise<Response> {
    const url = new URL(request.url);
    const [, , item = "", pattern = ""] = url.pathname.split("/");
    if (item === "like") {
      const like = new RegExp(pattern);
      return Response.json(Object.keys(DESCRIPTIONS).filter((name) => like.test(DESCRIPTIONS[name]!)));
    }
    const warehouse = url.searchParams.get("from") ?? env.files!.text("warehouse.txt").trim();
    const response = await fetch(new URL(`/warehouse/${item}`, warehouse), {
      headers: { authorization: `Bearer ${env.WAREHOUSE_KEY}` },
    });
    if (!response.ok) return problem(502, "the warehouse does not say");
    return Response.json(await response.json());
  },
};
