// Shapes of drawings.

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes, and text in it that is text. */
export function shape(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  if (text !== undefined) element.textContent = text;
  return element;
}
