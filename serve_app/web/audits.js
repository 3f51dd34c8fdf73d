/** The tab Audits: runs with their reports, and a form that starts one on an edit's photo and mask. */

import { $, el } from "./dom.js";
import { again, button, fill, pressed, when } from "./pictures.js";

const RUNS = 20;
/** Between two looks while one goes on. */
const LOOK_MS = 3000;
/** Whose sessions those of photos are that came with their jobs. */
const API_USER = "api";
const isOver = ({ status }) => !["queued", "running"].includes(status);

export function mount(element, context) {
  const { api } = context;
  let offered = "";
  const ids = { required: true, pattern: "[A-Za-z0-9_\\-]{1,128}" };
  const user = el("input", { name: "user_id", value: API_USER, ...ids });
  const session = el("input", { name: "session_id", placeholder: "of an edit: its job's id", ...ids });
  const scales = el("input", { value: "2, 4, 30", required: true, pattern: "\\s*\\d+(\\.\\d+)?(\\s*,\\s*\\d+(\\.\\d+)?)*\\s*" });
  const variants = el("fieldset", {}, el("legend", {}, "Variants"));
  const form = el(
    "form",
    { className: "panel" },
    el("h2", {}, "Start an audit"),
    el("p", { className: "soft" }, "Paints one photo by each variant at each guidance scale, and reports time, memory, cost and quality."),
    el("div", { className: "fields" }, el("label", { className: "wide" }, "User", user), el("label", { className: "wide" }, "Session", session)),
    variants,
    el("p", {}, el("label", {}, "Guidance scales, with commas between", scales)),
    el("button", { className: "primary" }, "Start"),
  );
  const list = el("ul", { className: "cards", "aria-label": "Audits" });
  const nothing = el("p", { className: "soft", hidden: true }, "No audits yet: choose a session and what to compare, and press Start.");
  element.append(el("div", { className: "columns" }, el("div", {}, nothing, list), form));

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    pressed($("button.primary", form), context, async () => {
      const chosen = [...variants.querySelectorAll(":checked")].map(({ value }) => value);
      if (!chosen.length) throw new Error("Choose a variant at least.");
      const whose = { user_id: user.value, session_id: session.value };
      const json = { ...whose, variants: chosen, guidance_scales: scales.value.split(",").map(Number) };
      await api.json("audit", { method: "POST", json, headers: { Prefer: "respond-async" } });
      await load();
    });
  });

  async function load() {
    const runs = await api.json(`audits?limit=${RUNS}`);
    fill(list, runs, "run_id", card);
    nothing.hidden = runs.length > 0;
    if (!runs.every(isOver)) again(element, () => load().catch(context.say), LOOK_MS);
  }

  function card(run) {
    const { run_id, status, stage, counts, error } = run;
    const cells = Object.entries(counts).map(([name, count]) => `${count} ${name.replaceAll("_", " ")}`);
    const cancel = () => api.json(`audits/${run_id}/cancel`, { method: "POST" }).then(load);
    const acts = el("p", { className: "row" }, isOver(run) ? null : button("Cancel", context, cancel));
    if (isOver(run) && status !== "failed") link(acts, run_id);
    return el(
      "li",
      { className: "panel" },
      el(
        "div",
        {},
        el("h2", {}, run_id),
        el(
          "p",
          { className: "row soft" },
          el("span", { className: `badge ${status}` }, status),
          isOver(run) ? null : el("span", {}, stage),
          el("span", {}, `session ${run.user_id}/${run.session_id}`),
          el("span", {}, when(run.created_at)),
          el("span", {}, `cells: ${cells.join(", ") || "none"}`),
        ),
        error ? el("p", { className: "notice error" }, `${error.code}: ${error.message}`) : null,
        acts,
      ),
    );
  }

  async function link(place, run_id) {
    const { report_url } = await api.json(`audits/${run_id}`).catch(() => ({}));
    place.append(
      report_url
        ? el("a", { className: "button", href: report_url, target: "_blank", rel: "noopener", "aria-label": `Report of ${run_id}` }, "Report")
        : "It has no report.",
    );
  }

  return async (params) => {
    const job = params.get("job") ?? context.job;
    if (job && job !== offered) {
      [user.value, session.value] = await sessionOf(job);
      offered = job;
    }
    const { models } = await api.json("v1/models");
    const names = models.filter((row) => row.capabilities.inpaint).map(({ id }) => id);
    const known = [...variants.querySelectorAll("input")];
    if (String(names) !== String(known.map(({ value }) => value))) {
      const boxes = names.map((value) => el("label", { className: "check inline" }, el("input", { type: "checkbox", value, checked: true }), value));
      variants.replaceChildren(variants.firstChild, ...boxes);
    }
    await load();
  };

  /** User and session: a photo that came with its job has the job's own. */
  async function sessionOf(job) {
    const { artifacts } = await api.json(`v1/jobs/${job}/artifacts`);
    const [, ...of] = artifacts[0]?.s3_key.match(/^users\/([^/]+)\/sessions\/([^/]+)\//) ?? [];
    return of.length ? of : [API_USER, job];
  }
}
