/** The tab Jobs: the recent ones with their pictures, why they ended, and what can be done about it. */

import { isFinal } from "./api.js";
import { $, button, el, number, seconds } from "./dom.js";
import { again, card, fill, when } from "./pictures.js";

const JOBS = 30;
/** Pictures shown of a job. */
const SHOWN = 4;

export function mount(element, context) {
  const { api, go, say } = context;
  const state = $(".of-state", element), nothing = $(".nothing", element);

  async function load() {
    const status = state.value;
    const { jobs } = await api.json(`v1/jobs?limit=${JOBS}${status && `&status=${status}`}`);
    if (status !== state.value) return;
    fill($(".cards", element), jobs, "id", draw);
    nothing.hidden = jobs.length > 0;
    const what = status ? `No job is ${status}` : "No jobs yet";
    nothing.textContent = `${what}. Jobs of Edit and Generate, of messages and of the API appear here.`;
    again(element, () => load().catch(say));
  }

  function draw(job) {
    const { id, type, status, parameters, cost, timings, error_code: code } = job, isEdit = type === "inpaint";
    const act = (text, verb) => button(text, context, async () => {
      await api.json(`v1/jobs/${id}/${verb}`, { method: "POST" });
      await load();
    });
    const pictures = el("div", { className: "thumbs" });
    if (job.summary.completed) thumbs(pictures, job).catch(() => {});
    const facts = [
      job.dead_lettered && "dead letter",
      `${isEdit ? "Edit" : "Pictures"} by ${parameters.model_id}`,
      when(job.created_at),
      timings.total_s && `took ${seconds(timings.total_s)}`,
      cost && `cost ${number(cost, 2)}`,
      job.attempt > 1 && `attempt ${job.attempt}`,
    ];
    const acts = [
      button("Open", context, () => go({ tab: isEdit ? "edit" : "generate", job: id })),
      !isFinal(job) && act("Cancel", "cancel"),
      status === "failed" && act("Replay", "replay"),
      isEdit && button("Audit", context, () => go({ tab: "audits", job: id })),
      el("code", { className: "soft" }, id),
    ];
    const prompt = el("p", { className: "prompt" }, parameters.prompt);
    const why = code && status !== "canceled" && `${code}: ${job.error_message}`;
    return card(status, facts, why, pictures, prompt, el("p", { className: "row" }, ...acts.filter(Boolean)));
  }

  async function thumbs(place, { id, parameters }) {
    const found = await api.artifacts(id);
    const shown = found.filter(({ role }) => role !== "edited" || found.length === 1).slice(0, SHOWN);
    place.append(...shown.map(({ url, seed }) => {
      const picture = el("img", { src: url, alt: `Seed ${seed}: ${parameters.prompt}`, loading: "lazy" });
      return el("a", { href: url, target: "_blank", rel: "noopener" }, picture);
    }));
  }

  state.addEventListener("change", () => load().catch(say));
  return load;
}
