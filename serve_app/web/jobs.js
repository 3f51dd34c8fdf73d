/** The tab Jobs: the recent ones with their pictures, why they ended, and what can be done about it. */

import { isFinal } from "./api.js";
import { el, number, seconds } from "./dom.js";
import { again, artifacts, button, fill, when } from "./pictures.js";

const PAGE = 10, MOST = 200;
/** Between two looks while something goes on. */
const LOOK_MS = 3000;
/** Pictures shown of a job. */
const SHOWN = 4;
const STATES = ["", "queued", "running", "succeeded", "failed", "canceled", "expired"];

export function mount(element, context) {
  const { api, go } = context;
  const state = el("select", {}, ...STATES.map((value) => el("option", { value }, value || "any")));
  const list = el("ul", { className: "cards", "aria-label": "Jobs" });
  const nothing = el("p", { className: "soft", hidden: true });
  const more = button("Older", context, () => load(more.cursor), { hidden: true });
  const refresh = button("Refresh", context, () => load());
  element.append(el("div", { className: "row bar" }, el("label", {}, "State", state), refresh), nothing, list, more);
  state.addEventListener("change", () => {
    rows = [];
    load().catch(context.say);
  });
  let rows = [], asked = "";

  /** As many as are shown, the newest, or those behind `cursor` too. */
  async function load(cursor = null) {
    const limit = cursor ? PAGE : Math.min(Math.max(PAGE, rows.length), MOST);
    const query = String(new URLSearchParams({ limit, ...(state.value && { status: state.value }), ...(cursor && { cursor }) }));
    asked = query;
    const { jobs, next_cursor } = await api.json(`v1/jobs?${query}`);
    if (query !== asked) return;
    rows = cursor ? [...rows, ...jobs] : jobs;
    more.hidden = !next_cursor;
    more.cursor = next_cursor;
    show();
  }

  function show() {
    fill(list, rows, "id", card);
    nothing.hidden = rows.length > 0;
    const what = state.value ? `No job is ${state.value}` : "No jobs yet";
    nothing.textContent = `${what}. Those that are asked for on Edit and Generate, by message or over the API appear here.`;
    if (rows.some((job) => !isFinal(job.status))) again(element, () => load().catch(context.say), LOOK_MS);
  }

  function card(job) {
    const { id, type, status, parameters, cost, timings, error_code, error_message } = job;
    const isEdit = type === "inpaint";
    const act = (verb) => async () => {
      await api.json(`v1/jobs/${id}/${verb}`, { method: "POST" });
      await load();
    };
    const facts = [
      el("span", { className: `badge ${status}` }, status),
      job.dead_lettered ? el("span", { className: "badge failed" }, "dead letter") : null,
      `${isEdit ? "Edit" : "Pictures"} by ${parameters.model_id}`,
      when(job.created_at),
      timings.total_s === undefined ? null : `took ${seconds(timings.total_s)}`,
      cost === null ? null : `cost ${number(cost, 2)}`,
      job.attempt > 1 ? `attempt ${job.attempt}` : null,
    ];
    const pictures = el("div", { className: "thumbs" });
    if (job.summary.completed) thumbs(pictures, job);
    return el(
      "li",
      { className: "panel" },
      pictures,
      el(
        "div",
        {},
        el("p", { className: "row soft" }, ...facts.filter(Boolean).map((fact) => el("span", {}, fact))),
        el("p", { className: "prompt" }, parameters.prompt),
        error_code && status !== "canceled" ? el("p", { className: "notice error" }, `${error_code}: ${error_message}`) : null,
        el(
          "p",
          { className: "row" },
          button("Open", context, () => go({ tab: isEdit ? "edit" : "generate", job: id })),
          isFinal(status) ? null : button("Cancel", context, act("cancel")),
          status === "failed" ? button("Replay", context, act("replay")) : null,
          isEdit ? button("Audit", context, () => go({ tab: "audits", job: id })) : null,
          el("code", { className: "soft" }, id),
        ),
      ),
    );
  }

  async function thumbs(place, { id, parameters }) {
    const found = await artifacts(api, id).catch(() => []);
    const shown = found.filter((one) => one.role !== "edited" || found.length === 1);
    const pictures = shown.slice(0, SHOWN).map(({ url, seed }) => {
      const picture = el("img", { src: url, alt: `Seed ${seed}: ${parameters.prompt}`, loading: "lazy" });
      return el("a", { href: url, target: "_blank", rel: "noopener" }, picture);
    });
    place.replaceChildren(...pictures);
  }

  return () => load();
}
