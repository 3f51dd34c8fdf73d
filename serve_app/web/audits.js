/** The tab Audits. */

export function mount(element, context) {
  return () => {};
}
