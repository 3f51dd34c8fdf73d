/** The tab Audits: runs with their reports, and a form that starts one on an edit's photo and mask. */

import { $, button, el, submitted, values } from "./dom.js";
import { again, card, fill, when } from "./pictures.js";

const RUNS = 20;

export function mount(element, context) {
  const { api, say } = context, form = $("form", element), variants = $(".variants", form);
  const { user_id: user, session_id: session } = form.elements;
  let offered = "";

  submitted(form, context, async () => {
    const chosen = [...variants.querySelectorAll(":checked")].map(({ value }) => value);
    if (!chosen.length) throw new Error("Choose a variant at least.");
    const { scales, ...whose } = values(form), guidance_scales = scales.split(",").map(Number);
    const json = { ...whose, variants: chosen, guidance_scales };
    await api.json("audit", { method: "POST", json, headers: { Prefer: "respond-async" } });
    await load();
  });

  async function load() {
    const runs = await api.json(`audits?limit=${RUNS}`);
    fill($(".cards", element), runs, "run_id", draw);
    $(".nothing", element).hidden = runs.length > 0;
    again(element, () => load().catch(say));
  }

  function draw(run) {
    const { run_id, status, error } = run, isOver = !["queued", "running"].includes(status);
    const cells = Object.entries(run.counts).map(([name, count]) => `${count} ${name.replaceAll("_", " ")}`);
    const facts = [!isOver && run.stage, `session ${run.user_id}/${run.session_id}`, when(run.created_at)];
    const acts = el("p", { className: "row" });
    const cancel = () => api.json(`audits/${run_id}/cancel`, { method: "POST" }).then(load);
    if (!isOver) acts.append(button("Cancel", context, cancel));
    else if (status !== "failed") link(acts, run_id).catch(say);
    const why = error && `${error.code}: ${error.message}`;
    return card(status, [el("strong", {}, run_id), ...facts, `cells: ${cells.join(", ") || "none"}`], why, acts);
  }

  async function link(place, run_id) {
    const { report_url: href } = await api.json(`audits/${run_id}`);
    const given = { className: "button", href, target: "_blank", rel: "noopener", "aria-label": `Report of ${run_id}` };
    place.append(href ? el("a", given, "Report") : "It has no report.");
  }

  /** User and session: a photo that came with its job has the job's own. */
  async function sessionOf(job) {
    const [artifact] = await api.artifacts(job);
    return artifact?.s3_key.match(/^users\/([^/]+)\/sessions\/([^/]+)\//)?.slice(1) ?? ["api", job];
  }

  return async (params) => {
    const job = params.get("job") ?? context.job;
    if (job && job !== offered) {
      [user.value, session.value] = await sessionOf(job);
      offered = job;
    }
    if (!$("input", variants)) {
      const { models } = await api.json("v1/models");
      for (const { id: value } of models.filter(({ capabilities }) => capabilities.inpaint)) {
        const box = el("input", { type: "checkbox", value, checked: true });
        variants.append(el("label", { className: "check inline" }, box, value));
      }
    }
    await load();
  };
}
