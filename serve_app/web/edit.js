/** The tab Edit: a photo is opened, painted over, planned, asked for, watched, and compared with what came of it. */

import { Board } from "./board.js";
import { Compare } from "./compare.js";
import { $, number, offer, pressed, seconds, submitted, values } from "./dom.js";
import { Mask } from "./mask.js";
import { Watch } from "./watch.js";

/** After the last stroke or word. */
const PLAN_AFTER_MS = 400;
const STATES = { ready: "ready", scaled_to_zero: "starts when asked", starting: "starting", failed: "failed" };

/** Upright. */
const decoded = (blob) => createImageBitmap(blob, { imageOrientation: "from-image" });

export function mount(element, context) {
  if (!globalThis.Konva) return () => {};
  const { api, say } = context;
  const find = (selector) => $(selector, element), form = find("form"), choice = form.elements.model_id;
  const board = new Board(find(".board")), compare = new Compare(find(".compare"));
  const watch = new Watch(find(".watch"), context, (job) => finished(job).catch(say));
  /** The plan that is shown; the job whose result is; the id of the one whose photo is, and its opening. */
  let plan = null, previous = null, shown = "", restoring = null;
  let photo = null, mask = null, states = {}, planning = null, timer = 0;

  // The photo and its mask

  async function open(file, pixels = null) {
    say("Opening the photo…");
    let picture = file, bitmap = await decoded(file).catch(() => null);
    if (!bitmap) {
      // The app shows what the browser does not, such as a HEIC, and says why it does not.
      const body = new FormData();
      body.append("content", file, "photo");
      picture = await (await api.ask("v1/photos", { method: "POST", body })).blob();
      bitmap = await decoded(picture);
    }
    const { width, height } = bitmap;
    if (photo) URL.revokeObjectURL(photo.url);
    photo = { file, url: URL.createObjectURL(picture) };
    mask = new Mask(width, height, (first, end) => board.redraw(first, end));
    board.open(bitmap, mask);
    setSize(Math.max(width, height) / 25);
    if (pixels) mask.take(pixels);
    find(".empty").hidden = true;
    find(".name").textContent = `${file.name}, ${width} × ${height}`;
    say("");
    painted();
  }

  async function openMask(file) {
    if (!mask) throw new Error("Open a photo first, then its mask.");
    mask.take(await decoded(file));
  }

  /** A person chose another photo, of which the job that is shown is not. */
  async function openAnother(file) {
    previous = null;
    shown = "";
    context.go({ tab: "edit" });
    await open(file);
  }

  for (const [selector, act] of [[".open-photo", openAnother], [".open-mask", openMask]]) {
    find(selector).addEventListener("change", ({ target }) => {
      if (target.files[0]) act(target.files[0]).catch(say);
      target.value = "";
    });
  }
  addEventListener("paste", ({ clipboardData: { files } }) => {
    const file = [...files].find(({ type }) => type.startsWith("image/"));
    if (file && !element.hidden) openAnother(file).catch(say);
  });
  // On all of the page, because a browser leaves it for a file that is dropped beside.
  for (const name of ["dragover", "dragleave", "drop"]) {
    addEventListener(name, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      const isOver = name === "dragover" || (name === "dragleave" && event.relatedTarget !== null);
      find(".stage").classList.toggle("over", isOver);
      if (name !== "drop" || element.hidden) return;
      (event.target.closest(".as-mask") ? openMask : openAnother)(event.dataTransfer.files[0]).catch(say);
    });
  }

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
    "+": acts.in, "=": acts.in, "-": acts.out, 0: acts.fit,
    "[": () => setSize(Math.min(board.size - 1, board.size / 1.2)),
    "]": () => setSize(Math.max(board.size + 1, board.size * 1.2)),
  };
  const commands = { z: acts.undo, Z: acts.redo, y: acts.redo, Enter: () => form.requestSubmit() };
  element.addEventListener("click", ({ target: { dataset } }) => {
    acts[dataset.act]?.();
    if (dataset.tool) setTool(dataset.tool);
  });
  find(".size").addEventListener("input", ({ target }) => setSize(2 ** target.value));
  find(".opacity").addEventListener("input", ({ target }) => board.over.opacity(Number(target.value)));
  element.addEventListener("keydown", (event) => {
    const isText = event.target.matches("input:not([type=range]), textarea, select");
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

  const asked = () => ({ type: "inpaint", ...values(form) });

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
      plan.tflop !== null && `${number(plan.tflop, 0)} TFLOP`,
      plan.seconds === null ? "time not known here" : `about ${seconds(plan.seconds)} on an ${plan.card}`,
      plan.cost !== null && `price ${number(plan.cost, 4)}`,
      states[choice.value]?.state !== "ready" && "and a cold start before: its weights are not loaded yet",
    ];
    find(".plan").textContent = takes.filter(Boolean).join(" · ");
  }

  // Jobs

  async function submit() {
    if (!mask || mask.isEmpty) throw new Error("Open a photo and paint over what is to go.");
    const planned = plan, body = api.form(asked(), { image: photo.file, mask: await mask.png() });
    const { job: { id } } = await api.json("v1/jobs", { method: "POST", body });
    if (planned) watch.remember(id, planned);
    shown = id;
    context.go({ tab: "edit", job: id, with: previous?.id });
  }

  submitted(form, context, submit);

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
    replan();
  }

  async function edited({ id, parameters: { model_id: name, seed } }) {
    const { url } = (await api.artifacts(id)).find(({ role }) => role === "edited");
    return { url, label: `${name}, seed ${seed}` };
  }

  async function finished(job) {
    if (job.type !== "inpaint" || job.status !== "succeeded") return;
    await restoring?.catch(() => {});
    const other = new URLSearchParams(location.hash.slice(1)).get("with");
    const [result, { original }] = await Promise.all([edited(job), inputs(job.id)]);
    const before = other && await api.json(`v1/jobs/${other}`).then(edited).catch(() => null);
    const first = { url: shown === job.id ? photo.url : original, label: "the photo" };
    compare.show([first, before].filter(Boolean), result);
    find(".compare").scrollIntoView({ block: "nearest" });
    const others = Object.keys(states).filter((name) => name !== job.parameters.model_id);
    offer(find(".other-variant"), others.map((name) => [name]));
    find(".other").hidden = others.length === 0;
    previous = job;
  }

  find(".again-seed").addEventListener("click", () => {
    fill(previous);
    form.elements.prompt.focus();
    say("The form has this job's values and its seed: change the prompt, a value or the mask, then paint.");
  });
  find(".again-other").addEventListener("click", ({ target }) => {
    fill(previous);
    choice.value = find(".other-variant").value;
    replan();
    pressed(target, context, submit);
  });

  async function variants() {
    const { variants, default_variant, defaults } = await api.json("ready");
    const chosen = choice.value || default_variant;
    states = variants;
    offer(choice, Object.entries(variants).map(([name, { state }]) => [name, `${name} (${STATES[state]})`]));
    choice.value = chosen;
    form.elements.steps.placeholder = defaults.steps ?? "";
    form.elements.guidance.placeholder = defaults.guidance_scale ?? "";
    find(".none-ready").hidden = Object.values(variants).some(({ state }) => /^(ready|scaled_to_zero)$/.test(state));
  }

  setTool("brush");
  setSize(40);
  painted();
  return async (params) => {
    await variants();
    const id = params.get("job");
    if (!id) watch.stop();
    if (!id || watch.job?.id !== id) find(".compare").hidden = true;
    if (!id) return;
    const job = await api.json(`v1/jobs/${id}`);
    if (job.type !== "inpaint") return context.go({ tab: "generate", job: id });
    restoring = restore(job);
    await Promise.all([restoring, watch.start(id)]);
  };
}
