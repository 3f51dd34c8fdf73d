/** Elements made in script. Whatever a person or a file says is text, never markup. */

export const $ = (selector, within = document) => within.querySelector(selector);

/** An element with properties, or attributes where a name has a dash, and children: elements or text. */
export function el(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** `1.5 s`, `2 min 5 s`. */
export function seconds(s) {
  if (s < 60) return `${s < 10 ? Math.round(s * 10) / 10 : Math.round(s)} s`;
  return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
}

export const number = (value, digits = 1) =>
  value.toLocaleString("en", { maximumFractionDigits: value !== 0 && Math.abs(value) < 0.1 ? 4 : digits });
