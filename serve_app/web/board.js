/** The photo with the mask over it, on Konva's stage: painting, erasing, zoom and pan by mouse, fingers and keys. */

/** Of the mask, as little-endian ABGR. */
const PAINTED = 0xff602eeb;
const MAX_ZOOM = 32;

const within = (at, most, least = 0) => Math.min(most, Math.max(least, at));

export class Board extends EventTarget {
  /** `brush`, `erase` or `move`. */
  tool = "brush";
  /** The brush's diameter, in the photo's pixels. */
  size = 40;
  mask = null;
  #pointers = new Map();
  #stroke = null;

  /** Sends `painted` when the mask has changed, and `cursor` when the keys have moved the cursor. */
  constructor(place) {
    super();
    const { Stage, Layer, Group, Circle } = globalThis.Konva, listening = false;
    this.place = place;
    this.stage = new Stage({ container: place, width: 1, height: 1, listening });
    this.picture = new Layer({ listening });
    /** The mask. */
    this.over = new Layer({ listening, opacity: 0.5 });
    this.frames = new Group();
    const line = { stroke: "#fff", strokeWidth: 1.5, strokeScaleEnabled: false };
    this.ring = new Circle({ ...line, visible: false, shadowColor: "#000", shadowBlur: 3, shadowOpacity: 1 });
    this.stage.add(this.picture, this.over, new Layer({ listening }).add(this.frames, this.ring));
    new ResizeObserver(() => this.#resize()).observe(place);
    const on = (name, act) => place.addEventListener(name, (event) => this.mask && act(event), { passive: false });
    on("pointerdown", (event) => this.#down(event));
    on("pointermove", (event) => this.#move(event));
    on("pointerup", (event) => this.#up(event, true));
    on("pointercancel", (event) => this.#up(event, false));
    on("pointerleave", () => this.ring.visible(false));
    on("wheel", (event) => this.#wheel(event));
    on("keydown", (event) => event.ctrlKey || event.metaKey || event.altKey || this.#key(event));
    on("keyup", ({ key }) => key === " " && this.#endStroke());
    on("blur", () => this.#endStroke());
  }

  /** A photo's bitmap, and the mask over it. */
  open(bitmap, mask) {
    const { Image } = globalThis.Konva, { width, height } = bitmap;
    this.#endStroke();
    this.mask = mask;
    this.shade = Object.assign(document.createElement("canvas"), { width, height });
    this.picture.destroyChildren().add(new Image({ image: bitmap, width, height }));
    this.over.destroyChildren().add(new Image({ image: this.shade, width, height }));
    this.cursor = { x: width / 2, y: height / 2 };
    this.fit();
  }

  setSize(size) {
    this.size = within(Math.round(size), 2048, 1);
    this.ring.radius(this.size / 2);
  }

  /** Shows what the mask has in these rows. */
  redraw(first, end) {
    this.shade.getContext("2d").putImageData(this.mask.image(PAINTED, 0, first, end), 0, first);
    this.over.batchDraw();
    if (!this.#stroke) this.dispatchEvent(new Event("painted"));
  }

  /** Boxes in the photo's pixels, in painting order. */
  showWindows(windows) {
    const { Rect } = globalThis.Konva;
    this.frames.destroyChildren();
    for (const { x, y, width, height } of windows) {
      const box = { x, y, width, height, strokeScaleEnabled: false };
      this.frames.add(new Rect({ ...box, stroke: "#000", strokeWidth: 3, opacity: 0.45 }));
      this.frames.add(new Rect({ ...box, stroke: "#ffd84d", strokeWidth: 1.5, dash: [7, 4] }));
    }
  }

  fit() {
    if (!this.mask) return;
    const { width, height } = this.stage.size(), scale = Math.min(width / this.mask.width, height / this.mask.height);
    this.#show(scale, (width - this.mask.width * scale) / 2, (height - this.mask.height * scale) / 2);
  }

  /** About a point of the stage, or its middle; what is there comes to lie at `to`. */
  zoom(factor, at = { x: this.stage.width() / 2, y: this.stage.height() / 2 }, to = at) {
    if (!this.mask) return;
    const was = this.stage.scaleX(), least = Math.min(1, 64 / Math.max(this.mask.width, this.mask.height));
    const scale = within(was * factor, MAX_ZOOM, least), { x, y } = this.stage.position();
    this.#show(scale, to.x - ((at.x - x) * scale) / was, to.y - ((at.y - y) * scale) / was);
  }

  #show(scale, x, y) {
    this.stage.scale({ x: scale, y: scale }).position({ x, y });
    // Close up, a pixel is a square.
    for (const layer of [this.picture, this.over]) layer.imageSmoothingEnabled(scale < 3);
  }

  #resize() {
    const { clientWidth: width, clientHeight: height } = this.place, isFirst = this.stage.width() === 1;
    this.stage.size({ width: Math.max(1, width), height: Math.max(1, height) });
    if (isFirst && width > 1) this.fit();
  }

  #at(event) {
    const box = this.place.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  #onPhoto(event) {
    const at = this.#at(event), scale = this.stage.scaleX(), from = this.stage.position();
    return { x: (at.x - from.x) / scale, y: (at.y - from.y) / scale };
  }

  #down(event) {
    event.preventDefault();
    this.place.focus({ preventScroll: true });
    this.place.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, this.#at(event));
    // With a second finger, what the first one began was no stroke.
    if (this.#pointers.size > 1) this.#endStroke(false);
    else if (event.button === 0 && this.tool !== "move") this.#beginStroke(this.#onPhoto(event));
  }

  #move(event) {
    if (event.pointerType !== "touch") this.#point(this.#onPhoto(event));
    if (!this.#pointers.has(event.pointerId)) return;
    const before = this.#grip();
    this.#pointers.set(event.pointerId, this.#at(event));
    if (this.#stroke) {
      const events = event.getCoalescedEvents?.() ?? [];
      for (const one of events.length ? events : [event]) this.#paintTo(this.#onPhoto(one));
    } else this.zoom(this.#grip().apart / before.apart, before, this.#grip());
  }

  /** The middle of the fingers, or where the only one is, and how far two are apart. */
  #grip() {
    const [a, b = a] = this.#pointers.values();
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: Math.hypot(a.x - b.x, a.y - b.y) || 1 };
  }

  #up(event, isWhole) {
    this.#pointers.delete(event.pointerId);
    this.#endStroke(isWhole);
  }

  #beginStroke(at) {
    this.mask.begin();
    this.#stroke = { at, value: this.tool === "erase" ? 0 : 255 };
    this.#paintTo(at);
  }

  #paintTo(at) {
    this.mask.line(this.#stroke.at, at, this.size / 2, this.#stroke.value);
    this.#stroke.at = at;
  }

  #endStroke(isWhole = true) {
    if (!this.#stroke) return;
    this.#stroke = null;
    this.mask.end(isWhole);
  }

  #point(at) {
    this.cursor = at;
    this.ring.setAttrs({ ...at, radius: this.size / 2, visible: this.tool !== "move" });
  }

  #wheel(event) {
    event.preventDefault();
    this.zoom(Math.exp((-event.deltaY * (event.deltaMode ? 20 : 1) * (event.ctrlKey ? 4 : 1)) / 500), this.#at(event));
  }

  #key(event) {
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };
    if (!arrows[event.key]) return;
    event.preventDefault();
    const by = event.shiftKey ? 1 : Math.max(1, Math.round(this.size / 2)), [right, down] = arrows[event.key];
    const { cursor: { x, y }, mask: { width, height } } = this;
    this.#point({ x: within(x + right * by, width), y: within(y + down * by, height) });
    if (this.#stroke) this.#paintTo(this.cursor);
    else if (event.key === " ") this.#beginStroke(this.cursor);
    this.dispatchEvent(new Event("cursor"));
  }
}
