/** The app's HTTP API: requests with the key, and problems as errors. Paths are relative to the page. */

const FINAL = ["succeeded", "failed", "canceled", "expired"];
export const isFinal = ({ status }) => FINAL.includes(status);

/** By an answer's status, what to do about it. */
const ADVICE = {
  401: (why) => `This app asks for an API key: enter yours at the top of the page. (${why})`,
  403: (why) => `This API key may not do that: ${why}`,
  429: (why) => `Too much at once: ${why}. Wait a moment, then try again.`,
  503: (why) => `${why}. Nothing was lost: try again in a moment.`,
};

export class Api {
  /** In memory alone: it is gone when the page is. */
  key = "";

  /** A Response that is no error. Raises Error, which says what to do and has the answer's `status`; where nothing
   * answers, it has none. */
  async ask(path, { method = "GET", headers = {}, json, body, signal } = {}) {
    const given = new Headers(headers), sent = { method, headers: given, body, signal };
    if (this.key) given.set("X-API-Key", this.key);
    if (json) given.set("Content-Type", "application/json");
    if (json) sent.body = JSON.stringify(json);
    const answer = await fetch(path, { ...sent, credentials: "omit", cache: "no-store" }).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Error("The app does not answer: is it running, and is this machine online?");
    });
    // What is not ready yet says so in its body.
    if (answer.ok || (answer.status === 503 && path === "ready")) return answer;
    const { status } = answer, { message, detail } = await answer.json().catch(() => ({}));
    const why = message ?? detail ?? `The app answered ${status}.`;
    throw Object.assign(new Error(ADVICE[status]?.(why) ?? why), { status });
  }

  json = async (path, options) => (await this.ask(path, options)).json();

  artifacts = async (id) => (await this.json(`v1/jobs/${id}/artifacts`)).artifacts;

  /** A form with the job's JSON, and files by the names of their parts. */
  form(job, files) {
    const form = new FormData();
    form.append("job", JSON.stringify(job));
    for (const [name, blob] of Object.entries(files)) form.append(name, blob, name);
    return form;
  }
}
