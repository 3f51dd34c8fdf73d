/** A photo as it is edited: upright, as the browser shows it or, of a HEIC, the app. */

/** `{file, bitmap, url, width, height, name}`. Raises Refused, in the app's words, for what neither can read. */
export async function openPhoto(file, api) {
  const name = file.name ?? "photo";
  let shown = file;
  let bitmap = await decoded(file).catch(() => null);
  if (bitmap === null) {
    const form = new FormData();
    form.append("content", file, "photo");
    shown = await (await api.ask("v1/photos", { method: "POST", body: form })).blob();
    bitmap = await decoded(shown);
  }
  return { file, name, bitmap, url: URL.createObjectURL(shown), width: bitmap.width, height: bitmap.height };
}

export const decoded = (blob) => createImageBitmap(blob, { imageOrientation: "from-image" });
