/** The photo with the mask over it, on Konva's stage: painting, erasing, zoom and pan by mouse, fingers and keys. */

/** Of the mask, as little-endian ABGR. */
const PAINTED = 0xff602eeb;
const MAX_ZOOM = 32;

export class Board extends EventTarget {
  /** `brush`, `erase` or `move`. */
  tool = "brush";
  /** The brush's diameter, in the photo's pixels. */
  size = 40;
  mask = null;
  #opacity = 0.5;
  #pointers = new Map();
  #stroke = null;
  #pinch = null;

  /** Sends `painted` when the mask has changed, and `cursor` when the keys have moved the cursor. */
  constructor(place) {
    super();
    const { Stage, Layer, Group, Circle } = globalThis.Konva, listening = false;
    this.place = place;
    this.stage = new Stage({ container: place, width: 1, height: 1, listening });
    this.picture = new Layer({ listening });
    this.frames = new Group();
    const line = { stroke: "#fff", strokeWidth: 1.5, strokeScaleEnabled: false };
    this.ring = new Circle({ ...line, visible: false, shadowColor: "#000", shadowBlur: 3, shadowOpacity: 1 });
    this.stage.add(this.picture, new Layer({ listening }).add(this.frames, this.ring));
    new ResizeObserver(() => this.#resize()).observe(place);
    const on = (name, act) => place.addEventListener(name, act, { passive: false });
    on("pointerdown", (event) => this.mask && this.#down(event));
    on("pointermove", (event) => this.mask && this.#move(event));
    on("pointerup", (event) => this.#up(event, true));
    on("pointercancel", (event) => this.#up(event, false));
    on("pointerleave", () => this.ring.visible(false));
    on("wheel", (event) => this.mask && this.#wheel(event));
    on("keydown", (event) => this.mask && !(event.ctrlKey || event.metaKey || event.altKey) && this.#key(event));
    on("keyup", (event) => event.key === " " && this.#endStroke());
    on("blur", () => this.#endStroke());
  }

  /** A photo's bitmap, and the mask over it. */
  open(bitmap, mask) {
    const { Image } = globalThis.Konva, { width, height } = bitmap;
    this.#endStroke();
    this.mask = mask;
    this.shade = Object.assign(document.createElement("canvas"), { width, height });
    this.over = new Image({ image: this.shade, width, height, opacity: this.#opacity });
    this.picture.destroyChildren().add(new Image({ image: bitmap, width, height }), this.over);
    this.cursor = { x: width / 2, y: height / 2 };
    this.showWindows([]);
    this.fit();
  }

  setOpacity(opacity) {
    this.#opacity = opacity;
    this.over?.opacity(opacity);
  }

  setSize(size) {
    this.size = Math.min(2048, Math.max(1, Math.round(size)));
    this.ring.radius(this.size / 2);
  }

  /** Shows what the mask has in a box. */
  redraw({ x0, y0, x1, y1 }) {
    const image = new ImageData(x1 - x0, y1 - y0), pixels = new Uint32Array(image.data.buffer);
    for (let y = y0, at = 0; y < y1; y++) {
      const row = y * this.mask.width;
      for (let x = x0; x < x1; x++, at++) if (this.mask.data[row + x]) pixels[at] = PAINTED;
    }
    this.shade.getContext("2d").putImageData(image, x0, y0);
    this.picture.batchDraw();
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

  /** About a point of the stage; without one, about its middle. */
  zoom(factor, at = { x: this.stage.width() / 2, y: this.stage.height() / 2 }) {
    if (!this.mask) return;
    const was = this.stage.scaleX(), least = Math.min(1, 64 / Math.max(this.mask.width, this.mask.height));
    const scale = Math.min(MAX_ZOOM, Math.max(least, was * factor)), { x, y } = this.stage.position();
    this.#show(scale, at.x - ((at.x - x) * scale) / was, at.y - ((at.y - y) * scale) / was);
  }

  #show(scale, x, y) {
    this.stage.scale({ x: scale, y: scale }).position({ x, y });
    // Close up, a pixel is a square.
    this.picture.imageSmoothingEnabled(scale < 3);
  }

  #pan(x, y) {
    const was = this.stage.position();
    this.stage.position({ x: was.x + x, y: was.y + y });
  }

  #resize() {
    const { clientWidth: width, clientHeight: height } = this.place;
    const isFirst = this.stage.width() === 1;
    this.stage.size({ width: Math.max(1, width), height: Math.max(1, height) });
    if (isFirst && width > 1) this.fit();
  }

  #at(event) {
    const box = this.place.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  #onPhoto({ x, y }) {
    const scale = this.stage.scaleX(), from = this.stage.position();
    return { x: (x - from.x) / scale, y: (y - from.y) / scale };
  }

  #down(event) {
    const at = this.#at(event);
    event.preventDefault();
    this.place.focus({ preventScroll: true });
    this.place.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, at);
    // With a second finger, what the first one began was no stroke.
    if (this.#pointers.size > 1) {
      this.#endStroke(false);
      this.#pinch = this.#between();
    } else if (event.button === 0 && this.tool !== "move") this.#beginStroke(this.#onPhoto(at));
  }

  #move(event) {
    const at = this.#at(event), was = this.#pointers.get(event.pointerId);
    if (event.pointerType !== "touch") this.#point(this.#onPhoto(at));
    if (!was) return;
    this.#pointers.set(event.pointerId, at);
    if (this.#stroke) {
      const events = event.getCoalescedEvents?.() ?? [];
      for (const one of events.length ? events : [event]) this.#paintTo(this.#onPhoto(this.#at(one)));
    } else if (this.#pointers.size === 1) this.#pan(at.x - was.x, at.y - was.y);
    else {
      const before = this.#pinch, now = (this.#pinch = this.#between());
      this.#pan(now.x - before.x, now.y - before.y);
      this.zoom(now.apart / before.apart, now);
    }
  }

  #between() {
    const [a, b] = this.#pointers.values();
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: Math.hypot(a.x - b.x, a.y - b.y) || 1 };
  }

  #up(event, isWhole) {
    this.#pointers.delete(event.pointerId);
    if (this.#pointers.size > 1) this.#pinch = this.#between();
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
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const closer = () => this.zoom(1.25);
    const zooms = { "+": closer, "=": closer, "-": () => this.zoom(0.8), 0: () => this.fit() };
    if (arrows[event.key]) {
      const by = event.shiftKey ? 1 : Math.max(1, Math.round(this.size / 2)), [right, down] = arrows[event.key];
      const within = (at, most) => Math.min(most, Math.max(0, at)), { width, height } = this.mask;
      this.#point({ x: within(this.cursor.x + right * by, width), y: within(this.cursor.y + down * by, height) });
      if (this.#stroke) this.#paintTo(this.cursor);
      this.dispatchEvent(new Event("cursor"));
    } else if (event.key === " ") {
      this.#point(this.cursor);
      if (!this.#stroke) this.#beginStroke(this.cursor);
    } else if (zooms[event.key]) zooms[event.key]();
    else return;
    event.preventDefault();
  }
}
