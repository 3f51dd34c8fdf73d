/** Pictures that a job has made, as figures; and lists of cards that keep up with what changes. */

import { el } from "./dom.js";

/** Between two looks at a list. */
const LOOK_MS = 3000;

/** An artifact with its seed and a download. `prompt` is what its picture shows. */
export function figure({ url, seed, width, height }, prompt) {
  // In a new tab where the link leads to a bucket: its pictures are of another origin, whose links download nothing.
  const download = el("a", { href: url, download: "", target: "_blank", rel: "noopener" }, "Download");
  const picture = el("img", { src: url, alt: prompt, loading: "lazy", width: width ?? 0, height: height ?? 0 });
  return el("figure", {}, picture, el("figcaption", { className: "row spread" }, `Seed ${seed}`, download));
}

/** A card: a status, facts, an error, and what else there is. */
export function card(status, facts, error, ...more) {
  const badge = el("span", { className: `badge ${status}` }, status);
  const texts = facts.filter(Boolean).map((fact) => el("span", {}, fact));
  const says = el("p", { className: "row soft" }, badge, ...texts);
  return el("li", { className: "panel" }, says, error && el("p", { className: "notice error" }, error), ...more);
}

/** Fills `list` with cards of `rows`, by their keys: one that says the same stays, and the focus stays where it is. */
export function fill(list, rows, key, draw) {
  const before = Object.fromEntries([...list.children].map((item) => [item.says, item]));
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const { id } = focused?.closest("li") ?? {};
  list.replaceChildren(...rows.map((row) => {
    const says = JSON.stringify(row);
    return before[says] ?? Object.assign(draw(row), { says, id: row[key] });
  }));
  if (!focused) return;
  const its = [...(document.getElementById(id)?.querySelectorAll("button, a") ?? [])];
  const same = its.find((one) => one === focused) ?? its.find((one) => one.textContent === focused.textContent);
  (same ?? its[0])?.focus({ preventScroll: true });
}

/** Calls `look` again in a while, unless the tab is hidden then or was shown again, which looks itself. */
export function again(element, look) {
  clearTimeout(element.looksAgain);
  element.looksAgain = setTimeout(() => element.hidden || look(), LOOK_MS);
}

export const when = (iso) => new Date(iso).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
