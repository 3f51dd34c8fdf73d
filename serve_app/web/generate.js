/** The tab Generate: a prompt, a model with what it takes, and the pictures as they land. */

import { isFinal } from "./api.js";
import { $, el, seconds } from "./dom.js";
import { artifacts, button, figure, pressed } from "./pictures.js";

/** Between two looks at a job that waits, for its place in the queue. */
const LOOK_MS = 3000;
const COLD = {
  available: "Not loaded: the first picture waits until it is, which takes minutes for a large model.",
  loading: "Loading: pictures wait until it is ready.",
};

const number = (name, text, given) => el("label", {}, text, el("input", { type: "number", name, ...given }));

export function mount(element, context) {
  const { api, go } = context;
  let models = [], loras = [], watching = new AbortController();

  const form = el("form", { className: "panel" });
  const model = el("select", { name: "model_id", required: true });
  const about = el("p", { className: "soft wide", id: "about-model" });
  model.setAttribute("aria-describedby", about.id);
  const negative = el("label", { className: "wide" }, "Negative prompt", el("input", { name: "negative_prompt", maxLength: 2000 }));
  const scheduler = el("label", {}, "Scheduler", el("select", { name: "scheduler" }));
  const withLoras = el("fieldset", {}, el("legend", {}, "LoRAs"));
  const sizes = { min: 64, max: 2048 };
  const prompt = el("textarea", { name: "prompt", required: true, maxLength: 2000, placeholder: "What the picture shows" });
  form.append(
    el("h2", {}, "Make pictures"),
    el(
      "div",
      { className: "fields" },
      el("label", { className: "wide" }, "Prompt", prompt),
      el("label", { className: "wide" }, "Model", model),
      about,
      negative,
      number("width", "Width, px", sizes),
      number("height", "Height, px", sizes),
      number("count", "Pictures", { min: 1, value: 1, required: true }),
      number("seed", "Seed", { min: 0, max: Number.MAX_SAFE_INTEGER, placeholder: "made up, and told" }),
      number("steps", "Steps", { min: 1, max: 100 }),
      number("guidance", "Guidance", { min: 0, max: 100, step: "any" }),
      scheduler,
    ),
    withLoras,
    el("button", { className: "primary" }, "Generate"),
  );
  const results = el("section", { "aria-label": "Pictures" });
  element.append(el("div", { className: "columns" }, results, form));
  const nothing = () => el("p", { className: "soft" }, "Nothing here yet: say what to show, and press Generate.");

  function choose() {
    const chosen = models.find((one) => one.id === model.value);
    for (const button of form.querySelectorAll("button")) button.disabled = !chosen;
    if (!chosen) return;
    const { capabilities, defaults } = chosen;
    const cold = chosen.state === "failed" ? `It cannot work: ${chosen.error}` : COLD[chosen.state];
    const takes = `Takes sizes in multiples of ${capabilities.multiple_px}, up to ${capabilities.max_count} pictures`;
    about.textContent = `${takes}${capabilities.negative_prompt ? "" : ", no negative prompt"}. ${cold ?? ""}`;
    negative.hidden = !capabilities.negative_prompt;
    scheduler.hidden = !capabilities.schedulers?.length;
    const names = ["", ...(capabilities.schedulers ?? [])];
    scheduler.lastChild.replaceChildren(...names.map((name) => el("option", { value: name }, name || "the model's")));
    for (const name of ["width", "height", "steps", "guidance"]) form.elements[name].placeholder = defaults[name] ?? "";
    form.elements.width.step = form.elements.height.step = capabilities.multiple_px;
    form.elements.count.max = capabilities.max_count;
    const fit = loras.filter((one) => one.lora.family === chosen.kind.split("-")[0]);
    withLoras.hidden = chosen.kind === "fake";
    withLoras.replaceChildren(withLoras.firstChild, ...fit.map(loraRow));
    if (!fit.length) withLoras.append(el("p", { className: "soft" }, "None for this model: register one with ", el("code", {}, "fluxfill loras add FILE"), "."));
  }

  function loraRow({ id, name, lora }) {
    const weight = { type: "number", value: 1, min: -10, max: 10, step: 0.05, "aria-label": `Weight of ${name}` };
    const label = el("label", { className: "check" }, el("input", { type: "checkbox", value: id }), `${name} ${lora.trigger_word && `(say “${lora.trigger_word}”)`}`);
    return el("div", { className: "row lora" }, label, el("input", weight));
  }

  function asked() {
    const given = { type: "generate" };
    for (const { name, type, value, parentElement } of form.elements) {
      if (name && value !== "" && !parentElement.hidden) given[name] = type === "number" ? Number(value) : value;
    }
    const rows = withLoras.hidden ? [] : [...withLoras.querySelectorAll(".lora")].filter((row) => $(":checked", row));
    if (rows.length) given.loras = rows.map((row) => ({ id: $(":checked", row).value, scale: Number($("[type=number]", row).value) }));
    return given;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    pressed($("button.primary", form), context, async () => {
      const { job } = await api.json("v1/jobs", { method: "POST", json: asked() });
      go({ tab: "generate", job: job.id });
    });
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  model.addEventListener("change", choose);

  /** The job's pictures as they land, until it is over or another is watched. */
  async function watch(id) {
    watching.abort();
    watching = new AbortController();
    const { signal } = watching;
    const status = el("p", { role: "status" }), bar = el("progress", { max: 1, "aria-label": "Progress" });
    const cancel = button("Cancel", context, () => api.json(`v1/jobs/${id}/cancel`, { method: "POST" }));
    const pictures = el("div", { className: "pictures" });
    let job;
    async function look() {
      const now = await api.json(`v1/jobs/${id}`, { signal });
      const landed = now.summary.completed > pictures.children.length ? await artifacts(api, id) : [];
      if (signal.aborted) return;
      job = now;
      for (const one of landed.slice(pictures.children.length)) pictures.append(figure(one, job.parameters.prompt));
      status.textContent = says(job);
      bar.hidden = cancel.hidden = isFinal(job.status);
      bar.value = job.progress;
    }
    await look();
    results.replaceChildren(el("h2", {}, job.parameters.prompt), status, el("div", { className: "row" }, bar, cancel), pictures);
    const looking = setInterval(() => job.status === "queued" && look().catch(() => {}), LOOK_MS);
    try {
      for await (const { event, data } of api.events(id, signal)) {
        if (event === "progress") bar.value = data.progress;
        else if (event !== "log") await look();
      }
    } finally {
      clearInterval(looking);
    }
  }

  function says({ status, queue_position, summary, parameters, error_code, error_message, timings }) {
    const landed = `${summary.completed} of ${summary.count}`;
    if (status === "queued") {
      const cold = COLD[models.find((one) => one.id === parameters.model_id)?.state];
      return `Waiting, number ${queue_position} in the queue. ${cold ? `The model is cold. ${cold}` : ""}`;
    }
    if (status === "running") return `Painting: ${landed} there.`;
    if (status === "succeeded") return `Done: ${landed}, in ${seconds(timings.total_s ?? 0)}.`;
    return `It ${status === "failed" ? "failed" : `is ${status}`}: ${error_message} (${error_code}). ${landed} there.`;
  }

  return async (params) => {
    if (!results.children.length) results.append(nothing());
    const rows = (await api.json("v1/models")).models;
    [models, loras] = [rows.filter((row) => row.capabilities.generate), rows.filter((row) => row.lora)];
    const chosen = model.value;
    model.replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
    if (models.some(({ id }) => id === chosen)) model.value = chosen;
    if (!models.length) about.textContent = "This app serves no model that makes pictures: name one under generators in its config.";
    choose();
    const id = params.get("job");
    if (id) await watch(id);
  };
}
