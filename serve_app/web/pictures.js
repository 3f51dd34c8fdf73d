/** Pictures that a job has made, as figures; and how a tab keeps up with what changes. */

import { el } from "./dom.js";

/** The artifacts of a job, in their order, with their links. */
export const artifacts = async (api, id) => (await api.json(`v1/jobs/${id}/artifacts`)).artifacts;

/** One with its seed and a download. `prompt` is what its picture shows. */
export function figure({ url, seed, width, height }, prompt) {
  // In a new tab where the link leads to a bucket: its pictures are of another origin, whose links download nothing.
  const download = { href: url, download: "", target: "_blank", rel: "noopener" };
  return el(
    "figure",
    {},
    el("img", { src: url, alt: prompt || "The edited photo", loading: "lazy", width: width ?? 0, height: height ?? 0 }),
    el("figcaption", { className: "row spread" }, `Seed ${seed}`, el("a", download, "Download")),
  );
}

/** Does what a button is pressed for, once at a time. What that raises, the page says. */
export async function pressed(button, context, work) {
  if (button.ariaDisabled) return;
  // A button that is really disabled loses the focus.
  button.ariaDisabled = "true";
  try {
    context.say("");
    await work();
  } catch (error) {
    context.say(error);
  } finally {
    button.ariaDisabled = null;
  }
}

export function button(text, context, work, given = {}) {
  const made = el("button", { type: "button", ...given }, text);
  made.addEventListener("click", () => pressed(made, context, work));
  return made;
}

/** Fills `list` with what `rows` are drawn as, by their keys: a row that says the same stays, with the focus in it. */
export function fill(list, rows, key, draw) {
  const before = new Map([...list.children].map((item) => [item.dataset.key, item]));
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const [inside, label] = [focused?.closest("li")?.dataset.key, focused?.textContent];
  const items = rows.map((row) => {
    const [known, text] = [before.get(row[key]), JSON.stringify(row)];
    if (known?.says === text) return known;
    const item = Object.assign(draw(row), { says: text });
    item.dataset.key = row[key];
    return item;
  });
  if (items.length !== list.children.length || items.some((item, at) => item !== list.children[at])) list.replaceChildren(...items);
  if (!focused || list.contains(document.activeElement)) return;
  const its = [...(items.find((item) => item.dataset.key === inside)?.querySelectorAll("button, a, summary") ?? [])];
  (its.find((one) => one.textContent === label) ?? its[0])?.focus();
}

/** Calls `look` again in `wait_ms`, unless the tab is hidden then or was shown again, which looks itself. */
export function again(element, look, wait_ms) {
  clearTimeout(element.looksAgain);
  element.looksAgain = setTimeout(() => element.hidden || look(), wait_ms);
}

export const when = (iso) => new Date(iso).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
