/** Two pictures of one size: a slider between them, or side by side; fitted, or pixel by pixel. */

import { $, offer } from "./dom.js";

export class Compare {
  constructor(element) {
    this.element = element;
    element.addEventListener("click", ({ target }) => {
      if (target.tagName === "BUTTON") this.#set(target.dataset);
    });
    $(".against", element).addEventListener("change", () => this.#draw());
    for (const image of this.#all("img")) image.addEventListener("load", () => this.#set({}));
    this.#set({ view: "slider", scale: "fit" });
  }

  #all = (selector) => this.element.querySelectorAll(selector);

  /** `{url, label}` each. At first the last of the others is shown. */
  show(others, result) {
    Object.assign(this, { others, result });
    offer($(".against", this.element), others.map(({ label }, at) => [at, label]));
    $(".against", this.element).value = others.length - 1;
    $(".download", this.element).href = result.url;
    this.#draw();
    this.element.hidden = false;
  }

  #draw() {
    const first = this.others[$(".against", this.element).value];
    for (const [name, { url, label }] of Object.entries({ first, second: this.result })) {
      for (const image of this.#all(`img.${name}`)) Object.assign(image, { src: url, alt: label });
      $(`figcaption.${name}`, this.element).textContent = label;
    }
  }

  /** Pixel by pixel: of the screen's, whatever its density. */
  #set(given) {
    const { view, scale } = Object.assign(this.element.dataset, given);
    for (const button of this.#all("[data-view], [data-scale]")) {
      button.ariaPressed = [view, scale].includes(button.dataset.view ?? button.dataset.scale);
    }
    $(".slider", this.element).hidden = view !== "slider";
    $(".pair", this.element).hidden = view !== "pair";
    for (const image of this.#all("img")) {
      image.style.width = scale === "pixels" ? `${image.naturalWidth / devicePixelRatio}px` : "";
    }
  }
}
