/** The page: its tabs, the key, and the address. `#tab=edit&job=ID` says what is shown, so a reload shows it again. */

import { Api } from "./api.js";
import { $ } from "./dom.js";
import * as audits from "./audits.js";
import * as edit from "./edit.js";
import * as generate from "./generate.js";
import * as jobs from "./jobs.js";

const TABS = { edit, generate, jobs, audits };
const names = Object.keys(TABS), shows = {};

/** What a tab's `mount(element, context)` gets. It returns `show(params)`, called when the tab is shown, and again when
 * the address or the key has changed. */
const context = {
  api: new Api(),
  /** The job that the tab Edit showed last. */
  job: null,
  /** Another address, such as `{tab: "edit", job: id}`. */
  go(given) {
    location.hash = new URLSearchParams(Object.entries(given).filter(([, value]) => value));
  },
  /** Says something at the top of the page; an Error is shown as one, and an empty text is taken away. */
  say(what) {
    const isError = what instanceof Error;
    $("#notice").textContent = isError ? what.message : what;
    $("#notice").classList.toggle("error", isError);
    if (what.status === 401) $("#key").focus();
  },
};

function show() {
  const params = new URLSearchParams(location.hash.slice(1));
  const chosen = names.find((name) => name === params.get("tab")) ?? "edit";
  if (chosen === "edit") context.job = params.get("job") ?? context.job;
  for (const name of names) {
    $(`#tab-${name}`).ariaSelected = name === chosen;
    $(`#tab-${name}`).tabIndex = name === chosen ? 0 : -1;
    $(`#${name}`).hidden = name !== chosen;
  }
  shows[chosen] ??= TABS[chosen].mount($(`#${chosen}`), context);
  Promise.resolve(shows[chosen](params)).catch(context.say);
}

for (const [at, name] of names.entries()) {
  const tab = $(`#tab-${name}`);
  tab.addEventListener("click", () => context.go({ tab: name }));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = names.at(to % names.length);
    context.go({ tab: next });
    $(`#tab-${next}`).focus();
  });
}
$("header form").addEventListener("submit", (event) => event.preventDefault());
$("#key").addEventListener("change", ({ target }) => {
  context.api.key = target.value.trim();
  context.say("");
  show();
});
addEventListener("hashchange", show);
$("#not-built").hidden = Boolean(globalThis.Konva && customElements.get("img-comparison-slider"));
show();
