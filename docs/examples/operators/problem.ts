/** A problem document (RFC 9457), as the host's own answers are. */
export function problem(status: number, title: string): Response {
  return Response.json({ title, status }, { status, headers: { "content-type": "application/problem+json" } });
}
