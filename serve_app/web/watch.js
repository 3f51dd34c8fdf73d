/** A job while it is not over: where it waits, how far it is, and how to stop it. */

import { isFinal } from "./api.js";
import { $, number, seconds } from "./dom.js";

/** Between two looks. */
const LOOK_MS = 1000;
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

  /** `seen(job)` is called at each look, the last of which is at a job that is over. */
  constructor(element, { api, say }, seen) {
    Object.assign(this, { element, api, seen });
    this.stop();
    $(".cancel", element).addEventListener("click", () => this.#cancel().catch(say));
  }

  /** Shows a job until it is over. One that is shown already goes on. */
  async start(id) {
    if (id === this.#id) return;
    this.stop();
    const { signal } = (this.#stopping = new AbortController());
    this.#id = id;
    for (;;) {
      try {
        const job = await this.#look(id, signal);
        this.seen(job);
        if (isFinal(job)) return;
      } catch (error) {
        if (signal.aborted) return;
        // A key or a job that is refused stays so, until the key has changed; all else may pass.
        if (error.status < 500 && error.status !== 429) {
          this.stop();
          throw error;
        }
        this.#remark(error.message);
      }
      await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
      if (signal.aborted) return;
    }
  }

  stop() {
    this.#stopping?.abort();
    this.#id = "";
    this.job = null;
    this.element.hidden = true;
  }

  /** The job; before its first step, the state of the model that it waits for, too. */
  async #look(id, signal) {
    const job = await this.api.json(`v1/jobs/${id}`, { signal }), name = job.parameters.model_id;
    const { cost, timings: { total_s } } = job;
    const facts = [total_s && `in ${seconds(total_s)}`, cost && `cost ${number(cost, 4)}`];
    let remark = job.error_message ?? facts.filter(Boolean).join(", ");
    if (!isFinal(job) && !job.progress) {
      const { variants, generators } = await this.api.json("ready", { signal });
      const { state } = variants[name] ?? generators?.[name] ?? {};
      remark = REMARKS[state] ? `${name} ${REMARKS[state]}` : "";
    }
    this.#show(job);
    this.#remark(remark);
    return job;
  }

  #remark(text) { $(".log", this.element).textContent = text; }

  #show(job) {
    this.job = job;
    const place = job.status === "queued" && job.queue_position, { progress: share } = job;
    $(".state", this.element).textContent = place ? `Waiting: number ${place} in the queue` : STATES[job.status];
    $(".cancel", this.element).hidden = isFinal(job);
    this.element.hidden = false;
    const bar = $("progress", this.element);
    bar.value = share;
    if (!share && !isFinal(job)) bar.removeAttribute("value");
    const { steps = 0, windows = 0 } = JSON.parse(sessionStorage.getItem(`plan:${job.id}`)) ?? {};
    const at = Math.round(share * steps * windows), texts = [`${Math.floor(share * 100)}%`];
    if (at > 0 && windows > 1) texts.push(`window ${Math.ceil(at / steps)} of ${windows}`);
    if (at > 0) texts.push(`step ${((at - 1) % steps) + 1} of ${steps}`);
    $(".share", this.element).textContent = share > 0 && share < 1 ? texts.join(", ") : "";
  }

  /** What a job was planned as: the tab remembers it through a reload. */
  remember(id, { steps_run: steps, windows: { length: windows } }) {
    sessionStorage.setItem(`plan:${id}`, JSON.stringify({ steps, windows }));
  }

  async #cancel() { this.#show(await this.api.json(`v1/jobs/${this.job.id}/cancel`, { method: "POST" })); }
}
