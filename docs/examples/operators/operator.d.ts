// Types of what an operator is handed. The globals are those of the web platform (WinterTC's Minimum Common API).

/** What was granted in the policy file: plain values and secrets by their names, and the two below. */
export interface Env {
  /** With `kv`: a store of this operator's own, encrypted at rest. */
  readonly kv?: KeyValueStore;
  /** With `read`: contents of the listed files, as they were when the operator was loaded. */
  readonly files?: Files;
  /**
   * Plain values are themselves. A secret is a placeholder: put it into a header of an outgoing request to one of the
   * secret's destinations, and the host replaces it on the way.
   */
  readonly [name: string]: unknown;
}

export interface KeyValueStore {
  get(key: string): Promise<string | null>;
  getBytes(key: string): Promise<Uint8Array | null>;
  put(key: string, value: string | Uint8Array): Promise<void>;
  delete(key: string): Promise<void>;
  list(prefix?: string): Promise<string[]>;
}

export interface Files {
  text(name: string): string;
  bytes(name: string): Uint8Array;
  names(): string[];
}

export interface Context {
  /** The request's id, as the log and the client know it. */
  readonly requestId: string | null;
  /** Work that goes on after the response. Bounded in CPU time, and waited for when the operator is replaced. */
  waitUntil(promise: Promise<unknown>): void;
}
