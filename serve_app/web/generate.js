/** The tab Generate. */

export function mount(element, context) {
  return () => {};
}
