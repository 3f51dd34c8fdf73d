/** The app's HTTP API: requests with the key, problems as errors, a job's events. Paths are relative to the page. */

const FINAL = ["succeeded", "failed", "canceled", "expired"];
export const isFinal = (status) => FINAL.includes(status);

/** An answer that is a problem (RFC 9457). `message` says what to do about it. */
export class Refused extends Error {
  constructor(status, { code = "", detail = "", message = detail, details = {} } = {}) {
    super(advice(status, message || `The app answered ${status}.`));
    Object.assign(this, { status, code, details });
  }
}

function advice(status, message) {
  if (status === 401) return `This app asks for an API key: enter yours at the top of the page. (${message})`;
  if (status === 403) return `This API key may not do that: ${message}`;
  if (status === 429) return `Too much at once: ${message}. Wait a moment, then try again.`;
  if (status === 503) return `${message}. Nothing was lost: try again in a moment.`;
  return message;
}

export class Api {
  /** In memory alone: it is gone when the page is. */
  key = "";

  /** A Response that is no error. Raises Refused; Error where nothing answers; and AbortError. */
  async ask(path, { method = "GET", headers = {}, json, body, signal } = {}) {
    const given = { ...headers, ...(this.key ? { "X-API-Key": this.key } : {}) };
    if (json !== undefined) {
      given["Content-Type"] = "application/json";
      body = JSON.stringify(json);
    }
    let answer;
    try {
      answer = await fetch(path, { method, headers: given, body, signal, credentials: "omit", cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The app does not answer: is it running, and is this machine online?");
    }
    // What is not ready yet says so in its body.
    if (answer.ok || (answer.status === 503 && path === "ready")) return answer;
    throw new Refused(answer.status, await answer.json().catch(() => ({})));
  }

  /** The JSON of an answer; of an empty one, null. */
  async json(path, options) {
    const answer = await this.ask(path, options);
    return answer.status === 204 ? null : answer.json();
  }

  /** A form with the job's JSON, and files by the names of their parts. */
  form(job, files = {}) {
    const form = new FormData();
    form.append("job", JSON.stringify(job));
    for (const [name, blob] of Object.entries(files)) form.append(name, blob, name);
    return form;
  }

  /**
   * What happens to a job, `{event, data}` each, until it is over. A stream that ends or breaks is taken up again after
   * its last message, so nothing is lost or told twice.
   */
  async *events(id, signal) {
    let last = "", waits_ms = 500;
    for (;;) {
      let isOver = false;
      try {
        const headers = last ? { "Last-Event-ID": last } : {};
        const answer = await this.ask(`v1/jobs/${id}/events`, { headers, signal });
        if (answer.status === 204) return;
        for await (const message of messages(answer.body)) {
          if (message.id) last = message.id;
          waits_ms = 500;
          yield message;
          if (["state", "snapshot"].includes(message.event) && isFinal(message.data.status)) isOver = true;
        }
      } catch (error) {
        // A key or a job that is refused stays so; all else may pass.
        if (signal.aborted || (error instanceof Refused && error.status < 500 && error.status !== 429)) throw error;
      }
      if (isOver) return;
      await new Promise((resolve) => setTimeout(resolve, waits_ms));
      if (signal.aborted) return;
      waits_ms = Math.min(waits_ms * 2, 10_000);
    }
  }
}

/** Server-sent events of a body, https://html.spec.whatwg.org/multipage/server-sent-events.html; data is JSON. */
async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text = (text + value).replaceAll("\r\n", "\n");
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = {};
      for (const line of block.split("\n")) {
        const [, name, rest] = line.match(/^([a-z]+): ?(.*)$/) ?? [];
        if (name) fields[name] = name in fields ? `${fields[name]}\n${rest}` : rest;
      }
      if (fields.data) yield { event: fields.event, id: fields.id, data: JSON.parse(fields.data) };
    }
  }
}
