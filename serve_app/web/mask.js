/** The mask: a byte for each of the photo's pixels, 0 (kept) or 255 (painted). Nothing is smoothed: what is shown is
 * what leaves. */

/** Of patches that are kept for undo. */
const KEPT_BYTES = 256e6;

export class Mask {
  #undo = [];
  #redo = [];
  #before = null;
  #dirty = null;

  /** `changed(box)` is told of each box, `{x0, y0, x1, y1}`, whose pixels may have changed. */
  constructor(width, height, changed) {
    Object.assign(this, { width, height, changed, data: new Uint8Array(width * height) });
  }

  get isEmpty() { return !this.data.includes(255); }
  get canUndo() { return this.#undo.length > 0; }
  get canRedo() { return this.#redo.length > 0; }

  begin() { this.#before = this.data.slice(); }

  /** All pixels whose centre is no further than `radius` from the line, of which any part may lie outside. */
  line(from, to, radius, value) {
    radius = Math.max(radius, Math.SQRT1_2);
    const { width, height } = this, dx = to.x - from.x, dy = to.y - from.y;
    const dots = Math.ceil(Math.hypot(dx, dy) / Math.min(1, radius / 2)) || 1;
    for (let i = 0; i <= dots; i++) {
      const x = from.x + (dx * i) / dots - 0.5, y = from.y + (dy * i) / dots - 0.5;
      for (let row = Math.max(0, Math.ceil(y - radius)); row <= Math.min(height - 1, y + radius); row++) {
        const half = Math.sqrt(radius ** 2 - (row - y) ** 2);
        const first = Math.max(0, Math.ceil(x - half)), last = Math.min(width - 1, Math.floor(x + half));
        if (first <= last) this.data.fill(value, row * width + first, row * width + last + 1);
      }
    }
    const side = (a, b, most) => [Math.floor(Math.min(a, b) - radius), Math.ceil(Math.max(a, b) + radius)]
      .map((at) => Math.min(most, Math.max(0, at)));
    const [x0, x1] = side(from.x, to.x, width), [y0, y1] = side(from.y, to.y, height);
    if (x0 < x1 && y0 < y1) this.#touch({ x0, y0, x1, y1 });
  }

  #touch(box) {
    const { x0, y0, x1, y1 } = this.#dirty ?? box, { min, max } = Math;
    this.#dirty = { x0: min(x0, box.x0), y0: min(y0, box.y0), x1: max(x1, box.x1), y1: max(y1, box.y1) };
    this.changed(box);
  }

  /** Ends what `begin` began, which can be undone from now on; or drops it. */
  end(isWhole = true) {
    const box = this.#dirty;
    if (box && isWhole) {
      this.#undo.push({ box, pixels: this.#cut(this.#before, box) });
      this.#redo = [];
      let bytes = 0;
      const first = this.#undo.findLastIndex(({ pixels }) => (bytes += pixels.length) > KEPT_BYTES);
      this.#undo.splice(0, first + 1);
    } else if (box) this.data.set(this.#before);
    this.#before = this.#dirty = null;
    if (box) this.changed(box);
  }

  undo() { this.#swap(this.#undo, this.#redo); }
  redo() { this.#swap(this.#redo, this.#undo); }

  #swap(from, to) {
    const { box, pixels } = from.pop() ?? {};
    if (!box) return;
    to.push({ box, pixels: this.#cut(this.data, box) });
    const wide = box.x1 - box.x0;
    for (let y = box.y0, at = 0; y < box.y1; y++, at += wide) {
      this.data.set(pixels.subarray(at, at + wide), y * this.width + box.x0);
    }
    this.changed(box);
  }

  #cut(data, { x0, y0, x1, y1 }) {
    const cut = new Uint8Array((x1 - x0) * (y1 - y0));
    for (let y = y0, at = 0; y < y1; y++, at += x1 - x0) {
      cut.set(data.subarray(y * this.width + x0, y * this.width + x1), at);
    }
    return cut;
  }

  /** Every pixel becomes what `value(pixel, index)` says. */
  fill(value) {
    this.begin();
    this.data.forEach((pixel, i) => { this.data[i] = value(pixel, i); });
    this.#touch({ x0: 0, y0: 0, x1: this.width, y1: this.height });
    this.end();
  }

  clear() { this.fill(() => 0); }
  invert() { this.fill((pixel) => 255 - pixel); }

  /** White of a picture, as the app sees it: half the brightness or more, transparency on black. Raises Error for one
   * of another shape. */
  take(bitmap) {
    const { width, height } = this, ratio = (bitmap.width * height) / (bitmap.height * width);
    const sizes = `it has ${bitmap.width} × ${bitmap.height} pixels, and the photo ${width} × ${height}`;
    if (Math.abs(ratio - 1) > 0.01) throw new Error(`This mask does not fit the photo: ${sizes}.`);
    const pen = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    pen.imageSmoothingEnabled = false;
    pen.fillRect(0, 0, width, height);
    pen.drawImage(bitmap, 0, 0, width, height);
    const { data } = pen.getImageData(0, 0, width, height);
    this.fill((_, i) => (0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2] >= 127.5 ? 255 : 0));
  }

  /** A grey PNG, made here: browsers that guard against fingerprinting change the pixels that a canvas gives. */
  async png() {
    const rows = new Uint8Array((this.width + 1) * this.height), head = new DataView(new ArrayBuffer(13));
    for (let y = 0; y < this.height; y++) {
      rows.set(this.data.subarray(y * this.width, (y + 1) * this.width), y * (this.width + 1) + 1);
    }
    head.setUint32(0, this.width);
    head.setUint32(4, this.height);
    head.setUint8(8, 8);
    const packed = new Response(new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate")));
    const parts = [chunk("IHDR", head.buffer), chunk("IDAT", await packed.arrayBuffer()), chunk("IEND", new ArrayBuffer())];
    return new Blob([Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10), ...parts], { type: "image/png" });
  }
}

function chunk(type, data) {
  const out = new Uint8Array(data.byteLength + 12), view = new DataView(out.buffer), end = data.byteLength + 8;
  view.setUint32(0, data.byteLength);
  out.set(new TextEncoder().encode(type), 4);
  out.set(new Uint8Array(data), 8);
  let crc = -1;
  for (const byte of out.subarray(4, end)) {
    crc ^= byte;
    for (let k = 0; k < 8; k++) crc = (crc >>> 1) ^ (0xedb88320 & -(crc & 1));
  }
  view.setInt32(end, ~crc);
  return out;
}
