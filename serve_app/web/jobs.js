/** The tab Jobs. */

export function mount(element, context) {
  return () => {};
}
