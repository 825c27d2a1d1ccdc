// Talks to the server: JSON, server-sent events, and the API key of this tab.

const KEY = "atlas-jax-key";
const CUT_OFF = "the connection ended before the answer was complete; ask again.";

export class Problem extends Error {
  constructor(detail, status) {
    super(detail);
    this.status = status;
  }
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers(more) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function checked(reply) {
  if (reply.ok) return reply;
  let detail = `the server answered with status ${reply.status}`;
  try {
    detail = (await reply.json()).detail || detail;
  } catch {
    // no problem+json: the status has to do
  }
  throw new Problem(detail, reply.status);
}

async function sent(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("the server cannot be reached; is it still running?", 0);
  }
}

export async function get(path) {
  return (await checked(await sent(path, { headers: headers({}) }))).json();
}

async function post(path, body, signal) {
  const options = {
    method: "POST",
    headers: headers({ "content-type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  };
  return checked(await sent(path, options));
}

export async function retrieve(body, signal) {
  return (await post("v1/retrieve", body, signal)).json();
}

// Calls onEvent(name, data) for each event of the answer; fails if the last one does not come.
export async function answer(body, onEvent, signal) {
  const reply = await post("v1/answers", { ...body, stream: true }, signal);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) throw new Problem(CUT_OFF, 0);
    rest += value;
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const [name, data] = rest.slice(0, end).split("\n");
      rest = rest.slice(end + 2);
      const event = name.slice("event: ".length);
      onEvent(event, JSON.parse(data.slice("data: ".length)));
      if (event === "done") return;
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(CUT_OFF, 0);
  }
}
