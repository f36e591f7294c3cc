// Inputs that only older workflows use. They keep their place among the saved values, and are out of sight unless linked.

/** The names of a node's inputs that its definition hides. */
function formerOf(node) {
  const { required, optional } = node.constructor?.nodeData?.input ?? {};
  const inputs = Object.entries({ ...required, ...optional });
  return new Set(inputs.filter(([, spec]) => spec[1]?.hidden).map(([name]) => name));
}

/** Whether a node's definition hides inputs. */
export function hasFormer(node) {
  return formerOf(node).size > 0;
}

/** Hide the former inputs of a node; those of an older workflow that links one of them stay in sight. */
export function hideFormer(node) {
  const former = formerOf(node);
  const inputs = (node.inputs ?? []).filter((input) => former.has(input.name));
  const used = inputs.some((input) => input.link != null);
  for (const input of inputs) {
    if (!input.widget && input.link == null) node.removeInput(node.inputs.indexOf(input));
  }
  for (const widget of node.widgets ?? []) {
    if (!former.has(widget.name)) continue;
    widget.hidden = !used; // the classic renderer's
    widget.options.hidden = !used; // the Vue renderer's
  }
}
