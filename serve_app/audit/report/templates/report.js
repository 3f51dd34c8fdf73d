"use strict";
const element = (id) => document.getElementById(id);
const viewer = element("viewer");
const compare = element("compare");
const divider = element("divider");
const shots = [...document.querySelectorAll("a.shot")];
let shown = 0;

function divide(percent) {
  divider.value = percent;
  compare.style.setProperty("--at", `${divider.value}%`);
}

function copy(image, kind) {
  const same = image.cloneNode();
  same.removeAttribute("id");
  same.className = kind;
  same.draggable = false;
  return same;
}

function show(index) {
  shown = (index + shots.length) % shots.length;
  const shot = shots[shown];
  const figures = shot.parentElement.querySelector(".figures");
  const original = element("original");
  compare.style.setProperty("--ratio", original.naturalWidth / original.naturalHeight);
  const line = document.createElement("span");
  line.className = "line";
  compare.replaceChildren(copy(shot.firstElementChild, "painted"), copy(original, "before"), line);
  element("viewer-label").textContent = shot.dataset.label;
  element("viewer-figures").replaceChildren(...figures.cloneNode(true).childNodes);
  element("full").href = shot.href;
}

function drag(event) {
  const box = compare.getBoundingClientRect();
  divide(Math.round(((event.clientX - box.left) / box.width) * 100));
}

shots.forEach((shot, index) => {
  shot.addEventListener("click", (event) => {
    // As a link it still opens in another tab.
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(index);
    divide(50);
    viewer.showModal();
    divider.focus();
  });
});
divider.addEventListener("input", () => divide(divider.value));
compare.addEventListener("pointerdown", (event) => {
  compare.setPointerCapture(event.pointerId);
  drag(event);
});
compare.addEventListener("pointermove", (event) => {
  if (compare.hasPointerCapture(event.pointerId)) drag(event);
});
element("previous").addEventListener("click", () => show(shown - 1));
element("next").addEventListener("click", () => show(shown + 1));
element("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => {
  // The backdrop.
  if (event.target === viewer) viewer.close();
});
