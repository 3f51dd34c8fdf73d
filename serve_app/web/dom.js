/** Elements made in script, and buttons. Whatever a person or a file says is text, never markup. */

export const $ = (selector, within = document) => within.querySelector(selector);

/** An element with properties, or attributes where a name has a dash, and children, elements or text, if there. */
export function el(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter(Boolean));
  return element;
}

/** Offers `rows`, `[value, text]` each. What was chosen stays so while it is offered. */
export function offer(select, rows) {
  const chosen = select.value;
  select.replaceChildren(...rows.map(([value, text = value]) => el("option", { value }, text)));
  if (rows.some(([value]) => String(value) === chosen)) select.value = chosen;
}

/** A form's values, numbers as such; what is empty is the app's to choose. */
export function values(form) {
  const given = {};
  for (const [name, value] of new FormData(form)) {
    if (value !== "") given[name] = form.elements[name].type === "number" ? Number(value) : value;
  }
  return given;
}

/** Does what a button is pressed for, once at a time. What that raises, the page says. */
export async function pressed(button, { say }, work) {
  if (button.ariaDisabled) return;
  // A button that is really disabled loses the focus.
  button.ariaDisabled = "true";
  say("");
  await Promise.resolve().then(work).catch(say);
  button.ariaDisabled = null;
}

/** Does what a form's button is for. */
export function submitted(form, context, work) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    pressed($(".primary", form), context, work);
  });
}

export function button(text, context, work) {
  const made = el("button", { type: "button" }, text);
  made.addEventListener("click", () => pressed(made, context, work));
  return made;
}

/** `1.5 s`, `2 min 5 s`. */
export function seconds(s) {
  if (s < 60) return `${s < 10 ? Math.round(s * 10) / 10 : Math.round(s)} s`;
  return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
}

export const number = (value, digits = 1) =>
  value.toLocaleString("en", { maximumFractionDigits: value !== 0 && Math.abs(value) < 0.1 ? 4 : digits });
