// The page's whole conversation with the server: two requests, to its own origin.
import { readEvents } from "./events";
import type { Chunk, ModelEntry } from "./types";

/** A refusal of the server, or its absence; the message is for the reader. */
export class ApiError extends Error {
  /** @param status the HTTP status; 0 if no answer came. */
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

async function send(path: string, apiKey: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  if (apiKey) headers.set("Authorization", `Bearer ${apiKey}`);
  let response: Response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...init, headers });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached. Is `openbook serve` still running?", 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response: Response): Promise<ApiError> {
  const body = await response.json().catch(() => null);
  const message =
    typeof body?.error?.message === "string" ? body.error.message : `The server answered ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  return new ApiError(wait ? `${message} Try again in ${wait} s.` : message, response.status);
}

/** The served models, without the entries of their adapters, which `openbook.adapters` names. */
export async function listModels(apiKey: string): Promise<ModelEntry[]> {
  const response = await send("v1/models", apiKey);
  const { data } = (await response.json()) as { data: ModelEntry[] };
  return data.filter(({ parent }) => !parent);
}

/**
 * The parts of one answer as they come.
 *
 * @throws ApiError the server refused, failed on the way, or fell silent before the end.
 */
export async function* streamAnswer(
  path: "v1/chat/completions" | "v1/completions",
  body: Record<string, unknown>,
  apiKey: string,
  signal: AbortSignal,
): AsyncGenerator<Chunk> {
  const response = await send(path, apiKey, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.body) throw new ApiError("The server sent an empty answer.", response.status);
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data) as Chunk;
      if (chunk.error) throw new ApiError(chunk.error.message ?? "The server failed on the way.", response.status);
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
  }
  throw new ApiError("The connection ended before the answer did.", 0);
}
