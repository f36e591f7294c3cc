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

const FARTHEST = 32; // reroutes one behind the other; a workflow file may have them go round in a circle
const isReroute = (node) => node?.type === "Reroute";

/** The node that an input of a node is connected to, behind reroutes, if any. */
export function source(node, name) {
  const slot = node?.inputs?.findIndex((input) => input.name === name) ?? -1;
  let found = slot < 0 ? null : node.getInputNode(slot);
  for (let step = 0; isReroute(found) && step < FARTHEST; step += 1) found = found.getInputNode(0);
  return isReroute(found) ? null : found;
}

/** The nodes that any output of a node goes to, behind reroutes. */
export function targets(node) {
  const [found, looked] = [[], new Set([node])];
  for (const one of looked) {
    const next = (one.outputs ?? []).flatMap((_, slot) => one.getOutputNodes(slot) ?? []);
    for (const other of next) isReroute(other) ? looked.add(other) : found.push(other);
  }
  return found;
}

/** A widget of a node, or the one that it is linked to; undefined where neither is known. */
export function widgetOf(node, name) {
  const linked = source(node, name);
  const [from, called] = linked ? [linked, "value"] : [node, name];
  return from?.widgets?.find((widget) => widget.name === called);
}

/** What a widget of a node says, or what it is linked to; undefined where neither is known. */
export function valueOf(node, name) {
  return widgetOf(node, name)?.value;
}

const MOST_NODES = 20_000; // subgraphs inside subgraphs, each node as often as it runs

/** All nodes of a graph and of its subgraphs, as [the id that the server names, the node]. */
export function nodesWithin(graph) {
  const [found, open] = [[], [["", graph]]];
  while (open.length && found.length < MOST_NODES) {
    const [path, inside] = open.pop();
    for (const node of inside?.nodes ?? []) {
      found.push([`${path}${node.id}`, node]);
      if (node.subgraph) open.push([`${path}${node.id}:`, node.subgraph]);
    }
  }
  return found;
}
