// Finding nodes in the page's graph.

/**
 * The node of an id as the server names it: "3", or "7:3" for node 3 inside the subgraph node 7.
 * @returns {object | undefined}
 */
export function nodeAt(graph, id) {
  const steps = String(id ?? "").split(":");
  const last = steps.pop();
  let inside = graph;
  for (const step of steps) inside = inside?.getNodeById(Number(step))?.subgraph;
  return inside?.getNodeById(Number(last)) ?? undefined;
}

/** The node that an input of a node is connected to, if any. */
export function source(node, name) {
  const slot = node?.inputs?.findIndex((input) => input.name === name) ?? -1;
  return slot < 0 ? null : node.getInputNode(slot);
}

/** The nodes that any output of a node goes to. */
export function targets(node) {
  return (node.outputs ?? []).flatMap((_, slot) => node.getOutputNodes(slot) ?? []);
}

/** What a widget of a node says, or what it is linked to; undefined where neither is known. */
export function valueOf(node, name) {
  const linked = source(node, name);
  const [from, called] = linked ? [linked, "value"] : [node, name];
  return from?.widgets?.find((widget) => widget.name === called)?.value;
}
