/** Two pictures of one size: a slider between them, or side by side; fitted, or pixel by pixel. */

import { $, el } from "./dom.js";

export class Compare {
  constructor(element) {
    this.element = element;
    element.addEventListener("click", ({ target, target: { dataset } }) => {
      for (const name of ["view", "scale"]) if (dataset[name] && target !== element) this.#set(name, dataset[name]);
    });
    $(".against", element).addEventListener("change", () => this.#draw());
    for (const image of element.querySelectorAll("img")) image.addEventListener("load", () => this.#scale());
    this.#set("view", "slider");
    this.#set("scale", "fit");
  }

  /** `{url, label}` each. At first the last of the others is shown. */
  show(others, result) {
    Object.assign(this, { others, result });
    const choice = $(".against", this.element);
    choice.replaceChildren(...others.map(({ label }, value) => el("option", { value }, label)));
    choice.value = others.length - 1;
    $(".download", this.element).href = result.url;
    this.#draw();
    this.element.hidden = false;
  }

  hide() { this.element.hidden = true; }

  #draw() {
    const first = this.others[$(".against", this.element).value];
    for (const [name, { url, label }] of Object.entries({ first, second: this.result })) {
      for (const image of this.element.querySelectorAll(`img.${name}`)) Object.assign(image, { src: url, alt: label });
      $(`.label.${name}`, this.element).textContent = label;
    }
  }

  #set(name, value) {
    this.element.dataset[name] = value;
    for (const button of this.element.querySelectorAll(`button[data-${name}]`)) {
      button.ariaPressed = button.dataset[name] === value;
    }
    $(".slider", this.element).hidden = this.element.dataset.view !== "slider";
    $(".pair", this.element).hidden = this.element.dataset.view !== "pair";
    this.#scale();
  }

  /** Pixel by pixel: of the screen's, whatever its density. */
  #scale() {
    for (const image of this.element.querySelectorAll("img")) {
      image.style.width = this.element.dataset.scale === "pixels" ? `${image.naturalWidth / devicePixelRatio}px` : "";
    }
  }
}
