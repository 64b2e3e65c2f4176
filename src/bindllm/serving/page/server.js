// The server: its model, and answers as streams. Every error becomes a `ServerError` in plain words.

// Megabytes of a request that a server may refuse.
const LARGE = 8;

export class ServerError extends Error {
  /**
   * @param {string} message for people: what happened, and what to do next
   * @param {boolean} needsKey whether an API key is missing or wrong
   */
  constructor(message, needsKey = false) {
    super(message);
    this.needsKey = needsKey;
  }
}

/** Return the entry of the model in /v1/models: id, modalities, has_cache. */
export async function readModel(key) {
  const response = await send("v1/models", key, {});
  const body = await response.json().catch(() => null);
  if (!body?.data?.[0]?.id) throw new ServerError("This server lists no model. Is it bindllm serve?");
  return body.data[0];
}

/**
 * Ask for an answer.
 *
 * @param {object} body of /v1/chat/completions
 * @param {string} key API key, or ""
 * @param {AbortSignal} signal ends the answer early
 * @param {(text: string) => void} onPiece called with each piece of the answer
 * @returns {Promise<{finish: ?string, neighbors: Array, warnings: string[], least: number}>} why it ended, the images
 *   that the cache retrieved, warnings about the media, and with `logprobs` the probability of the least likely token
 */
export async function streamAnswer(body, key, signal, onPiece) {
  const payload = JSON.stringify({ ...body, stream: true });
  const headers = { "content-type": "application/json" };
  const response = await send("v1/chat/completions", key, { method: "POST", headers, body: payload, signal });
  const result = { finish: null, neighbors: [], warnings: [], least: 1 };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return result;
    const chunk = JSON.parse(data);
    // A failure after the first token has no status of its own.
    if (chunk.error) throw new ServerError(`The answer broke off: ${said(chunk)}`);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) onPiece(choice.delta.content);
    for (const { logprob } of choice?.logprobs?.content ?? []) result.least = Math.min(result.least, Math.exp(logprob));
    result.finish = choice?.finish_reason ?? result.finish;
    result.neighbors = chunk.neighbors ?? result.neighbors;
    result.warnings = chunk.warnings ?? result.warnings;
  }
  throw new ServerError("The connection ended before the answer was complete.");
}

async function send(path, key, options) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    // Relative, so that the page also works under a path of a proxy.
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // A server that refuses a large body may close the connection before its answer is read.
    const size = (options.body?.length ?? 0) / 1e6;
    const large = size > LARGE ? `, or it refused the ${size.toFixed(0)} MB of this conversation` : "";
    throw new ServerError(`The server cannot be reached${large}. Check that bindllm serve is running, then try again.`);
  }
  if (!response.ok) throw await explained(response);
  return response;
}

async function explained(response) {
  const words = said(await response.json().catch(() => null));
  const wait = Number(response.headers.get("retry-after"));
  const later = wait > 0 ? `Try again in ${wait} second${wait === 1 ? "" : "s"}.` : "Try again later.";
  switch (response.status) {
    case 401:
    case 403:
      return new ServerError("This server needs a valid API key. Enter it in the settings.", true);
    case 413:
      return new ServerError(`The conversation with its media is too large for this server. Use smaller files, or start a new chat. The server says: ${words}`);
    case 429:
      return new ServerError(`The server is busy. ${later}`);
    case 503:
      return new ServerError(`The server does not take requests now. ${later}`);
    case 504:
      return new ServerError(`The server took too long: ${words}`);
    default:
      return new ServerError(
        response.status < 500 ? `The server refused this message: ${words}` : `The server failed: ${words}`,
      );
  }
}

/** Return the message of an error body. */
function said(body) {
  const message = body?.error?.message;
  return typeof message === "string" && message ? message : "it gives no reason.";
}

/** Yield the data of server-sent events; comments keep the connection alive and have none. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
