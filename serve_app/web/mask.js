/** The mask: a byte for each of the photo's pixels, 0 (kept) or 255 (painted). Nothing is smoothed: what is shown is
 * what leaves. */

/** Of rows that are kept for undo. */
const KEPT_BYTES = 256e6;
/** Opaque, as little-endian ABGR. */
const WHITE = 0xffffffff, BLACK = 0xff000000;

export class Mask {
  #undo = [];
  #redo = [];
  #before = null;
  #rows = [];

  /** `changed(first, end)` is told of rows whose pixels may have changed, `end` not among them. */
  constructor(width, height, changed) {
    Object.assign(this, { width, height, changed, data: new Uint8Array(width * height) });
  }

  get isEmpty() { return !this.data.includes(255); }
  get canUndo() { return this.#undo.length > 0; }
  get canRedo() { return this.#redo.length > 0; }

  begin() {
    this.#before = this.data.slice();
    this.#rows = [this.height, 0];
  }

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
    const within = (y) => Math.min(height, Math.max(0, Math.floor(y)));
    this.#touch(within(Math.min(from.y, to.y) - radius), within(Math.max(from.y, to.y) + radius + 1));
  }

  #touch(first, end) {
    this.#rows = [Math.min(this.#rows[0], first), Math.max(this.#rows[1], end)];
    if (first < end) this.changed(first, end);
  }

  /** Ends what `begin` began, which can be undone from now on; or drops it. */
  end(isWhole) {
    const [first, end] = this.#rows;
    if (first >= end) return;
    this.#undo.push(this.#cut(this.#before, first, end));
    if (!isWhole) return this.#swap(this.#undo, []);
    let bytes = 0;
    this.#undo.splice(0, this.#undo.findLastIndex(({ pixels }) => (bytes += pixels.length) > KEPT_BYTES) + 1);
    this.#redo = [];
    this.changed(first, end);
  }

  undo() { this.#swap(this.#undo, this.#redo); }
  redo() { this.#swap(this.#redo, this.#undo); }

  #swap(from, to) {
    if (!from.length) return;
    const { first, end, pixels } = from.pop();
    to.push(this.#cut(this.data, first, end));
    this.data.set(pixels, first * this.width);
    this.changed(first, end);
  }

  #cut(data, first, end) { return { first, end, pixels: data.slice(first * this.width, end * this.width) }; }

  /** Every pixel becomes what `value(pixel, index)` says. */
  #fill(value) {
    this.begin();
    this.data.forEach((pixel, i) => { this.data[i] = value(pixel, i); });
    this.#touch(0, this.height);
    this.end(true);
  }

  clear() { this.#fill(() => 0); }
  invert() { this.#fill((pixel) => 255 - pixel); }

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
    this.#fill((_, i) => (0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2] >= 127.5 ? 255 : 0));
  }

  /** Rows in two colours, each as little-endian ABGR. */
  image(painted, kept, first = 0, end = this.height) {
    const { data, width } = this, image = new ImageData(width, end - first);
    const pixels = new Uint32Array(image.data.buffer);
    for (let i = 0, at = first * width; i < pixels.length; i++, at++) pixels[i] = data[at] ? painted : kept;
    return image;
  }

  png() {
    const canvas = new OffscreenCanvas(this.width, this.height);
    canvas.getContext("2d").putImageData(this.image(WHITE, BLACK), 0, 0);
    return canvas.convertToBlob();
  }
}
