/** The tab Edit. */

export function mount(element, context) {
  return () => {};
}
