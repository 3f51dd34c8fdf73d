/** A job while it is not over: where it waits, how far it is, and how to stop it. */

import { isFinal } from "./api.js";
import { $, number, seconds } from "./dom.js";

/** Between two looks at the queue. */
const LOOK_MS = 3000;
const STATES = {
  queued: "Waiting for a place", running: "Painting", succeeded: "Done", failed: "Failed", canceled: "Canceled",
  expired: "Its deadline passed",
};
const REMARKS = {
  starting: "is starting: a cold start, which loads its weights first and takes a while.",
  scaled_to_zero: "was scaled to zero and is being started: a cold start, which loads its weights first.",
  failed: "cannot start; the job waits for it. GET /ready says why.",
};

export class Watch {
  #stopping = null;
  #id = "";

  /** `done(job)` is called when a job is over, `told(event)` at each event before. */
  constructor(element, api, { done, say, told = () => {} }) {
    Object.assign(this, { element, api, done, told });
    $(".cancel", element).addEventListener("click", () => this.#cancel().catch(say));
  }

  /** Shows a job until it is over. One that is shown already goes on. */
  async start(id) {
    if (id === this.#id) return;
    this.stop();
    const { signal } = (this.#stopping = new AbortController());
    this.#id = id;
    try {
      let job = await this.#look(id, signal);
      if (!isFinal(job.status)) {
        const looking = setInterval(() => this.job.progress > 0 || this.#look(id, signal).catch(() => {}), LOOK_MS);
        signal.addEventListener("abort", () => clearInterval(looking));
        for await (const { event, data } of this.api.events(id, signal)) this.#told(event, data);
        clearInterval(looking);
        job = await this.#look(id, signal);
      }
      if (!signal.aborted) this.done(job);
    } catch (error) {
      if (signal.aborted) return;
      // It is asked for again when the key has changed.
      this.stop();
      throw error;
    }
  }

  stop() {
    this.#stopping?.abort();
    this.#id = "";
    this.element.hidden = true;
  }

  #told(event, data) {
    this.told(event);
    if (event === "progress") this.#progress(data.progress);
    else if (event === "snapshot") this.#show(data);
    else if (event === "state") this.#show({ ...this.job, status: data.status });
    else if (event === "log" && data.level === "warning") this.#remark(data.message);
  }

  /** The job, its place in the queue, and the state of the model that it waits for, of which no event tells. */
  async #look(id, signal) {
    const paths = [`v1/jobs/${id}`, "ready"];
    const [job, ready] = await Promise.all(paths.map((path) => this.api.json(path, { signal })));
    const name = job.parameters.model_id, { state } = ready.variants[name] ?? ready.generators?.[name] ?? {};
    this.#show(job);
    if (isFinal(job.status)) {
      const { cost, timings: { total_s } } = job;
      const facts = [total_s ? `in ${seconds(total_s)}` : "", cost === null ? "" : `cost ${number(cost, 4)}`];
      this.#remark(job.error_message ?? facts.filter(Boolean).join(", "));
    } else this.#remark(REMARKS[state] && !job.progress ? `${name} ${REMARKS[state]}` : "");
    return job;
  }

  #remark(text) { $(".log", this.element).textContent = text; }

  #show(job) {
    this.job = job;
    const place = job.status === "queued" && job.queue_position;
    $(".state", this.element).textContent = place ? `Waiting: number ${place} in the queue` : STATES[job.status];
    $(".cancel", this.element).hidden = isFinal(job.status);
    this.#progress(job.progress);
    this.element.hidden = false;
  }

  #progress(share) {
    this.job.progress = share;
    const bar = $("progress", this.element), { steps = 0, windows = 0 } = this.#plan(this.job.id);
    if (share > 0 || isFinal(this.job.status)) bar.value = share;
    else bar.removeAttribute("value");
    const at = Math.round(share * steps * windows), texts = [`${Math.floor(share * 100)}%`];
    if (at > 0 && windows > 1) texts.push(`window ${Math.ceil(at / steps)} of ${windows}`);
    if (at > 0) texts.push(`step ${((at - 1) % steps) + 1} of ${steps}`);
    $(".share", this.element).textContent = share > 0 && share < 1 ? texts.join(", ") : "";
  }

  /** What a job was planned as: the tab remembers it through a reload. */
  remember(id, { steps_run: steps, windows: { length: windows } }) {
    sessionStorage.setItem(`plan:${id}`, JSON.stringify({ steps, windows }));
  }

  #plan(id) { return JSON.parse(sessionStorage.getItem(`plan:${id}`)) ?? {}; }

  async #cancel() {
    const { id } = this.job;
    this.#show(await this.api.json(`v1/jobs/${id}/cancel`, { method: "POST" }));
  }
}
