/** The tab Edit: a photo is opened, painted over, planned, asked for, watched, and compared with what came of it. */

import { Board } from "./board.js";
import { Compare } from "./compare.js";
import { $, el, number, seconds } from "./dom.js";
import { Mask } from "./mask.js";
import { decoded, openPhoto } from "./photo.js";
import { Watch } from "./watch.js";

/** After the last stroke or word. */
const PLAN_AFTER_MS = 400;
const STATES = { ready: "ready", scaled_to_zero: "starts when asked", starting: "starting", failed: "failed" };
const NUMBERS = ["steps", "guidance", "seed", "strength", "mask_grow"];

export function mount(element, context) {
  if (!globalThis.Konva) return () => {};
  const { api, say } = context;
  const find = (selector) => $(selector, element), form = find("form"), choice = form.elements.model_id;
  const board = new Board(find(".board")), compare = new Compare(find(".compare"));
  const watch = new Watch(find(".watch"), api, { say, done: (job) => finished(job).catch(say) });
  let photo = null, mask = null, plan = null, planning = null, timer = 0, previous = null;
  let shown = "", restoring = null;

  // The photo and its mask

  async function open(file, pixels = null) {
    say("Opening the photo…");
    if (photo) URL.revokeObjectURL(photo.url);
    photo = await openPhoto(file, api);
    mask = new Mask(photo.width, photo.height, (box) => board.redraw(box));
    board.open(photo.bitmap, mask);
    setSize(Math.max(photo.width, photo.height) / 25);
    if (pixels) mask.take(pixels);
    find(".empty").hidden = true;
    find(".name").textContent = `${photo.name}, ${photo.width} × ${photo.height}`;
    say("");
    painted();
  }

  async function openMask(file) {
    if (mask) mask.take(await decoded(file));
    else say("Open a photo first, then its mask.");
  }

  /** A person chose another photo, of which the job that is shown is not. */
  function opened(file) {
    if (!file) return;
    previous = null;
    context.go({ tab: "edit" });
    open(file).catch(say);
  }

  for (const [selector, act] of [[".open-photo", opened], [".open-mask", (file) => openMask(file).catch(say)]]) {
    find(selector).addEventListener("change", ({ target }) => {
      if (target.files[0]) act(target.files[0]);
      target.value = "";
    });
  }
  addEventListener("paste", ({ clipboardData }) => {
    if (!element.hidden) opened([...(clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/")));
  });
  const stage = find(".stage"), over = (event, isOver) => {
    event.preventDefault();
    stage.classList.toggle("over", isOver);
  };
  stage.addEventListener("dragover", (event) => over(event, true));
  stage.addEventListener("dragleave", (event) => stage.contains(event.relatedTarget) || over(event, false));
  stage.addEventListener("drop", (event) => {
    over(event, false);
    const [file] = event.dataTransfer.files;
    if (file && mask && event.target.closest(".as-mask")) openMask(file).catch(say);
    else opened(file);
  });

  // The tools

  function setTool(tool) {
    board.tool = board.place.dataset.tool = tool;
    for (const button of element.querySelectorAll("button[data-tool]")) {
      button.ariaPressed = button.dataset.tool === tool;
    }
  }

  /** The slider's steps grow with the brush. */
  function setSize(size) {
    board.setSize(size);
    find(".size").value = Math.log2(board.size);
    find(".size").ariaValueText = find(".size-px").textContent = `${board.size} px`;
  }

  const acts = {
    undo: () => mask?.undo(), redo: () => mask?.redo(), clear: () => mask?.clear(), invert: () => mask?.invert(),
    fit: () => board.fit(), in: () => board.zoom(1.5), out: () => board.zoom(1 / 1.5),
  };
  const keys = {
    b: () => setTool("brush"), e: () => setTool("erase"), h: () => setTool("move"), i: acts.invert,
    "[": () => setSize(Math.min(board.size - 1, board.size / 1.2)),
    "]": () => setSize(Math.max(board.size + 1, board.size * 1.2)),
  };
  const commands = { z: acts.undo, Z: acts.redo, y: acts.redo, Enter: () => form.requestSubmit() };
  element.addEventListener("click", ({ target: { dataset } }) => {
    if (dataset.act) acts[dataset.act]();
    else if (dataset.tool && dataset.tool !== board.tool) setTool(dataset.tool);
  });
  find(".size").addEventListener("input", ({ target }) => setSize(2 ** target.value));
  find(".opacity").addEventListener("input", ({ target }) => board.setOpacity(Number(target.value)));
  element.addEventListener("keydown", (event) => {
    const isText = /^(input|textarea|select)$/i.test(event.target.tagName) && event.target.type !== "range";
    const act = (event.ctrlKey || event.metaKey ? commands : keys)[event.key];
    if (!act || event.altKey || (isText && event.key !== "Enter")) return;
    event.preventDefault();
    act();
  });
  board.addEventListener("cursor", () => {
    find(".cursor").textContent = `Cursor at ${Math.round(board.cursor.x)}, ${Math.round(board.cursor.y)}`;
  });
  board.addEventListener("painted", painted);
  form.addEventListener("input", replan);

  function painted() {
    find('[data-act="undo"]').disabled = !mask?.canUndo;
    find('[data-act="redo"]').disabled = !mask?.canRedo;
    replan();
  }

  // What it would take

  function asked() {
    const values = { type: "inpaint" };
    for (const [name, value] of new FormData(form)) {
      if (value !== "") values[name] = NUMBERS.includes(name) ? Number(value) : value;
    }
    return values;
  }

  function replan() {
    plan = null;
    planning?.abort();
    clearTimeout(timer);
    board.showWindows([]);
    const isEmpty = !mask || mask.isEmpty;
    find(".paint").disabled = isEmpty;
    find(".plan").textContent = !mask ? "Open a photo first." : isEmpty ? "Paint over what is to go." : "Planning…";
    const unplanned = ({ name, message }) => { if (name !== "AbortError") find(".plan").textContent = message; };
    if (!isEmpty) timer = setTimeout(() => makePlan().catch(unplanned), PLAN_AFTER_MS);
  }

  async function makePlan() {
    const { signal } = (planning = new AbortController());
    const body = api.form(asked(), { mask: await mask.png() });
    const found = await api.json("v1/jobs/plan", { method: "POST", body, signal });
    if (signal.aborted) return;
    plan = found;
    board.showWindows(plan.windows);
    const sizes = new Set(plan.windows.map((window) => `${window.model_width} × ${window.model_height}`));
    const many = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
    const takes = [
      `${many(plan.windows.length, "window")} of ${[...sizes].join(", ")}`,
      `${many(plan.steps_run, "step")}${plan.windows.length > 1 ? " each" : ""}`,
      plan.tflop === null ? "" : `${number(plan.tflop, 0)} TFLOP`,
      plan.seconds === null ? "time not known here" : `about ${seconds(plan.seconds)} on an ${plan.card}`,
      plan.cost === null ? "" : `price ${number(plan.cost, 4)}`,
      choice.selectedOptions[0]?.dataset.state === "ready" ? "" : "and a cold start before: its weights are not loaded yet",
    ];
    find(".plan").textContent = takes.filter(Boolean).join(" · ");
  }

  // Jobs

  async function submit(job) {
    find(".paint").disabled = true;
    try {
      const body = api.form(job, { image: photo.file, mask: await mask.png() });
      const { job: { id } } = await api.json("v1/jobs", { method: "POST", body });
      if (plan) watch.remember(id, plan);
      shown = id;
      say("");
      context.go({ tab: "edit", job: id, with: previous?.id });
    } finally {
      find(".paint").disabled = mask.isEmpty;
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!mask || mask.isEmpty) say("Open a photo and paint over what is to go.");
    else submit(asked()).catch(say);
  });

  /** Links to a job's `original` and `mask`. */
  async function inputs(id) {
    const { inputs } = await api.json(`v1/jobs/${id}/inputs`);
    return Object.fromEntries(inputs.map(({ role, url }) => [role, url]));
  }

  /** Of a job that this page has not asked for: photo, mask and words, so that it can be done again. */
  async function restore(job) {
    if (shown === job.id) return;
    previous = null;
    fill(job);
    const { original, mask: painted } = await inputs(job.id);
    const files = [original, painted].map(async (url) => (await fetch(url, { credentials: "omit" })).blob());
    const [file, pixels] = await Promise.all(files).catch(() => {
      throw new Error("The blob store does not let this page read the photo: open it again to paint on it.");
    });
    await open(new File([file], `The photo of job ${job.id}`, { type: file.type }), await decoded(pixels));
    shown = job.id;
  }

  function fill({ parameters }) {
    for (const { name } of form.elements) if (name in parameters) form.elements[name].value = parameters[name] ?? "";
  }

  async function edited({ id, parameters: { model_id: name, seed } }) {
    const { artifacts } = await api.json(`v1/jobs/${id}/artifacts`);
    return { url: artifacts.find(({ role }) => role === "edited").url, label: `${name}, seed ${seed}` };
  }

  async function finished(job) {
    if (job.type !== "inpaint" || job.status !== "succeeded") return;
    await restoring?.catch(() => {});
    const other = new URLSearchParams(location.hash.slice(1)).get("with");
    const [result, { original }] = await Promise.all([edited(job), inputs(job.id)]);
    const before = other && await api.json(`v1/jobs/${other}`).then(edited).catch(() => null);
    const others = [{ url: shown === job.id ? photo.url : original, label: "the photo" }, ...(before ? [before] : [])];
    compare.show(others, result);
    find(".compare").scrollIntoView({ block: "nearest" });
    const names = [...choice.options].map(({ value }) => value).filter((name) => name !== job.parameters.model_id);
    find(".other-variant").replaceChildren(...names.map((value) => el("option", { value }, value)));
    find(".other").hidden = names.length === 0;
    previous = job;
  }

  find(".again-seed").addEventListener("click", () => {
    fill(previous);
    replan();
    form.elements.prompt.focus();
    say("The form has this job's values and its seed: change the prompt, a value or the mask, then paint.");
  });
  find(".again-other").addEventListener("click", () => {
    if (!photo) return say("Open the photo again first.");
    fill(previous);
    choice.value = find(".other-variant").value;
    replan();
    submit(asked()).catch(say);
  });

  async function variants() {
    const { variants, default_variant, defaults } = await api.json("ready");
    const chosen = choice.value || default_variant, canServe = ["ready", "scaled_to_zero"];
    choice.replaceChildren(...Object.entries(variants).map(([value, { state, error }]) =>
      el("option", { value, "data-state": state, title: error }, `${value} (${STATES[state]})`)));
    choice.value = chosen;
    form.elements.steps.placeholder = defaults.steps ?? "";
    form.elements.guidance.placeholder = defaults.guidance_scale ?? "";
    find(".none-ready").hidden = Object.values(variants).some(({ state }) => canServe.includes(state));
  }

  setTool("brush");
  setSize(40);
  painted();
  return async (params) => {
    await variants();
    const id = params.get("job");
    if (!id) watch.stop();
    if (!id || watch.job?.id !== id) compare.hide();
    if (!id) return;
    const job = await api.json(`v1/jobs/${id}`);
    if (job.type !== "inpaint") return context.go({ tab: "generate", job: id });
    restoring = restore(job);
    await Promise.all([restoring, watch.start(id)]);
  };
}
