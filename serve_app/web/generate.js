/** The tab Generate: a prompt, a model with what it takes, and the pictures as they land. */

import { $, el, offer, submitted, values } from "./dom.js";
import { figure } from "./pictures.js";
import { Watch } from "./watch.js";

const COLD = {
  available: "Not loaded: the first picture waits until it is, which takes minutes for a large model.",
  loading: "Loading: pictures wait until it is ready.",
};

export function mount(element, context) {
  const { api, go, say } = context, title = $(".title", element), landed = $(".landed", element);
  const form = $("form", element), { elements } = form, model = elements.model_id;
  const about = $("#about-model"), loras = $(".loras", form), noLoras = $(".no-loras", form);
  const watched = $("#edit .watch").cloneNode(true);
  title.after(watched);
  const watch = new Watch(watched, context, (job) => land(job).catch(say));
  /** By the LoRA's id: what was chosen stays. */
  const loraRows = {};
  let models = [];

  /** Shows the pictures that a job has made since. */
  async function land({ id, summary, parameters }) {
    if (summary.completed <= landed.children.length) return;
    const found = await api.artifacts(id);
    if (id !== watch.job?.id) return;
    landed.append(...found.slice(landed.children.length).map((one) => figure(one, parameters.prompt)));
  }

  function choose() {
    const chosen = models.find(({ id }) => id === model.value);
    $(".primary", form).disabled = !chosen;
    if (!chosen) return;
    const { capabilities: { multiple_px, max_count, negative_prompt }, defaults, state, error, kind } = chosen;
    const takes = `Takes sizes in multiples of ${multiple_px}, up to ${max_count} pictures`;
    const cold = state === "failed" ? `It cannot work: ${error}` : COLD[state] ?? "";
    about.textContent = `${takes}${negative_prompt ? "" : ", no negative prompt"}. ${cold}`;
    elements.negative_prompt.disabled = !negative_prompt;
    for (const name of ["width", "height", "steps", "guidance"]) elements[name].placeholder = defaults[name] ?? "";
    elements.width.step = elements.height.step = multiple_px;
    elements.count.max = max_count;
    const fit = models.filter(({ lora }) => lora?.family === kind.split("-")[0]);
    loras.disabled = loras.hidden = kind === "fake";
    noLoras.hidden = fit.length > 0;
    $("div", loras).replaceChildren(...fit.map((one) => (loraRows[one.id] ??= row(one))));
  }

  function row({ id, name, lora: { trigger_word: word } }) {
    const box = el("input", { type: "checkbox", value: id });
    const label = el("label", { className: "check inline" }, box, `${name} ${word && `(say “${word}”)`}`);
    const weight = { type: "number", value: 1, min: -10, max: 10, step: 0.05, "aria-label": `Weight of ${name}` };
    return el("div", { className: "row lora" }, label, el("input", weight));
  }

  function asked() {
    const boxes = [...loras.querySelectorAll(".lora :checked:enabled")];
    const chosen = boxes.map(({ value: id }) => ({ id, scale: Number($("[type=number]", loraRows[id]).value) }));
    return { type: "generate", ...values(form), ...(chosen.length && { loras: chosen }) };
  }

  submitted(form, context, async () => {
    const { job } = await api.json("v1/jobs", { method: "POST", json: asked() });
    go({ tab: "generate", job: job.id });
  });
  model.addEventListener("change", choose);

  return async (params) => {
    ({ models } = await api.json("v1/models"));
    const makers = models.filter(({ capabilities }) => capabilities.generate);
    offer(model, makers.map(({ id }) => [id]));
    if (!makers.length) about.textContent = "No model makes pictures here: name one under generators in the config.";
    choose();
    const id = params.get("job");
    if (!id) return;
    if (id !== watch.job?.id) {
      watch.stop();
      landed.replaceChildren();
      title.textContent = (await api.json(`v1/jobs/${id}`)).parameters.prompt;
    }
    await watch.start(id);
  };
}
