"use strict";

/** What a person should read; everything else is a fault of this page. */
class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Call the server. Rejects with a Problem where it cannot be reached or refuses. */
async function call(path, key, options = {}) {
  const headers = { ...(options.body && { "content-type": "application/json" }), ...(key && { authorization: `Bearer ${key}` }) };
  // Resolved here, since the page's own address may carry a user and a key, which fetch refuses.
  const address = new URL(path, location.origin + location.pathname);
  const response = await fetch(address, { ...options, headers }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is it still running?");
  });
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const message = (await response.json().catch(() => null))?.error?.message ?? response.statusText;
  const said = message.replace(/^messages\.0\.content\.(\d+)\.image_url\.url: /, (_, place) => `Picture ${Number(place) + 1}: `);
  const wait = response.headers.get("retry-after");
  switch (response.status) {
    case 401: return new Problem("This server wants an API key: enter it under Settings.", 401);
    case 413: return new Problem(`Too large for this server. ${said}`, 413);
    case 429: return new Problem(`The server is busy; try again in ${wait ? `${wait} s` : "a moment"}.`, 429);
    case 503: return new Problem(`No engine can answer now; try again in ${wait ? `${wait} s` : "a moment"}.`, 503);
    default: return new Problem(said || `The server answered ${response.status}.`, response.status);
  }
}

/** Yield the objects of an OpenAI event stream. Rejects with a Problem if it ends before [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let buffer = "", part; !(part = await reader.read()).done;) {
      const blocks = (buffer + part.value).split(/\r?\n\r?\n/);
      buffer = blocks.pop();
      for (const data of blocks.map(dataOf).filter(Boolean)) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Problem(event.error.message);
        yield event;
      }
    }
    throw new Problem("The answer broke off: the server closed the connection.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function dataOf(block) {
  return block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
}
