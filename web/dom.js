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

/**
 * A dialog over the page, which a click beside it or Escape closes, and which is gone then.
 * @param {{onkeydown?: (event: KeyboardEvent) => void, onclose?: () => void}} listeners
 */
export function dialog({ onkeydown, onclose }, ...children) {
  const element = make(
    "dialog",
    {
      class: "autorefiner-dialog",
      onkeydown: (event) => {
        event.stopPropagation();
        onkeydown?.(event);
      },
      onclick: (event) => event.target === element && element.close(),
      onclose: () => {
        onclose?.();
        element.remove();
      },
    },
    ...children,
  );
  document.body.append(element);
  element.showModal();
  return element;
}

/** The pack's style sheet, once. */
export function addStyles() {
  const href = new URL("./autorefiner.css", import.meta.url).href;
  if (![...document.styleSheets].some((sheet) => sheet.href === href)) {
    document.head.append(make("link", { rel: "stylesheet", href }));
  }
}

/** Call a function after one that a node may already have by that name. */
export function after(node, name, more) {
  const own = node[name];
  node[name] = function (...given) {
    const result = own?.apply(this, given);
    more.apply(this, given);
    return result;
  };
}
