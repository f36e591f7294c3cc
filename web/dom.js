// Small helpers for elements. Text goes in as text, never as markup.

/**
 * An element with attributes, listeners ("onclick" and so on) and children.
 * @param {string} tag
 * @param {Record<string, unknown>} attributes
 * @param {...(Node | string)} children
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, String(value));
  }
  element.append(...children);
  return element;
}

/** Let clicks and drags in an element be its own, not the graph's. */
export function ownPointer(element) {
  for (const event of ["pointerdown", "pointerup", "pointermove", "dblclick", "wheel"]) {
    element.addEventListener(event, (told) => told.stopPropagation(), { passive: true });
  }
  return element;
}

/** The pack's style sheet, once. */
export function addStyles() {
  const href = new URL("./autorefiner.css", import.meta.url).href;
  if (![...document.styleSheets].some((sheet) => sheet.href === href)) {
    document.head.append(make("link", { rel: "stylesheet", href }));
  }
}
