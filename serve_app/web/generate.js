/** The tab Generate: a prompt, a model with what it takes, and the pictures as they land. */

import { $, el } from "./dom.js";
import { artifacts, figure, pressed } from "./pictures.js";
import { Watch } from "./watch.js";

const COLD = {
  available: "Not loaded: the first picture waits until it is, which takes minutes for a large model.",
  loading: "Loading: pictures wait until it is ready.",
};

const number = (name, text, given) => el("label", {}, text, el("input", { type: "number", name, ...given }));

export function mount(element, context) {
  const { api, go, say } = context;
  /** By the LoRA's id: what was chosen stays. */
  const loraRows = {};
  let models = [], loras = [];

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
      number("seed", "Seed", { min: 0, max: Number.MAX_SAFE_INTEGER, placeholder: "any" }),
      number("steps", "Steps", { min: 1, max: 100 }),
      number("guidance", "Guidance", { min: 0, max: 100, step: "any" }),
      scheduler,
    ),
    withLoras,
    el("button", { className: "primary" }, "Generate"),
  );
  const title = el("h2", {}, "Nothing here yet: say what to show, and press Generate.");
  const landed = el("div", { className: "landed" });
  const watched = $("#edit .watch").cloneNode(true);
  watched.hidden = true;
  const watch = new Watch(watched, api, { say, done: land, told: (event) => event === "artifact" && land(watch.job).catch(say) });
  element.append(el("div", { className: "columns" }, el("div", {}, title, watched, landed), form));

  /** Shows the pictures that a job has made since. */
  async function land(job) {
    const found = await artifacts(api, job.id);
    if (job.id === watch.job.id) landed.append(...found.slice(landed.children.length).map((one) => figure(one, job.parameters.prompt)));
  }

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
    const before = scheduler.lastChild.value;
    scheduler.lastChild.replaceChildren(...names.map((name) => el("option", { value: name }, name || "the model's")));
    scheduler.lastChild.value = names.includes(before) ? before : "";
    for (const name of ["width", "height", "steps", "guidance"]) form.elements[name].placeholder = defaults[name] ?? "";
    form.elements.width.step = form.elements.height.step = capabilities.multiple_px;
    form.elements.count.max = capabilities.max_count;
    const fit = loras.filter((one) => one.lora.family === chosen.kind.split("-")[0]);
    withLoras.hidden = chosen.kind === "fake";
    withLoras.replaceChildren(withLoras.firstChild, ...fit.map((one) => (loraRows[one.id] ??= loraRow(one))));
    if (!fit.length) withLoras.append(el("p", { className: "soft" }, "None for this model: register one with ", el("code", {}, "fluxfill loras add FILE"), "."));
  }

  function loraRow({ id, name, lora }) {
    const weight = { type: "number", value: 1, min: -10, max: 10, step: 0.05, "aria-label": `Weight of ${name}` };
    const label = el("label", { className: "check inline" }, el("input", { type: "checkbox", value: id }), `${name} ${lora.trigger_word && `(say “${lora.trigger_word}”)`}`);
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

  return async (params) => {
    const rows = (await api.json("v1/models")).models;
    [models, loras] = [rows.filter((row) => row.capabilities.generate), rows.filter((row) => row.lora)];
    const chosen = model.value;
    model.replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
    if (models.some(({ id }) => id === chosen)) model.value = chosen;
    if (!models.length) about.textContent = "This app serves no model that makes pictures: name one under generators in its config.";
    choose();
    const id = params.get("job");
    if (!id) return;
    if (id !== watch.job?.id) {
      landed.replaceChildren();
      title.textContent = (await api.json(`v1/jobs/${id}`)).parameters.prompt;
    }
    await watch.start(id);
  };
}
