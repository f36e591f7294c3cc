// What the pack adds to ComfyUI's page: widgets on its nodes, through the page's own extension interface.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { askedOf } from "./asked.js";
import { CacheView } from "./cache.js";
import { Compare } from "./compare.js";
import { addStyles, after } from "./dom.js";
import { hasFormer, hideFormer } from "./former.js";
import { nodeAt, nodesWithin } from "./graph.js";
import { addLive } from "./live.js";
import { LORA_LOADERS, warnOfRefiner } from "./loras.js";
import { Steering } from "./steer.js";
import { Strip } from "./strip.js";
import { TEXT, Text } from "./text.js";
import { Trainer } from "./trainer.js";
import { word } from "./words.js";

const [CHUNK, TRAIN, LIVE] = ["chunk", "train", "live"].map((name) => `autorefiner.${name}`); // events of the server
const STRIPS = ["AutoRefinerSampler", "AutoRefinerCustomSampler"];
const FORMER = ["autorefiner_chunks", "autorefiner_training"]; // properties in which workflows kept runs
/** The nodes that may say something of their runs. */
const TELLING = [
  ...STRIPS,
  "AutoRefinerCompareVideos",
  "AutoRefinerLoadRefiner",
  "AutoRefinerPromptTimeline",
  "AutoRefinerReflectiveCache",
  "AutoRefinerSaveRefiner",
  "AutoRefinerScoreVideo",
  "AutoRefinerSearch",
  "AutoRefinerTrainRefiner",
];
const LOOK = 600; // milliseconds between two looks at the nodes
const PAUSE = 50; // milliseconds in which nodes of one graph are configured

/** What shows runs, by event and node, and what looks at caches; a node that leaves the graph leaves this too. */
const [shown, caches, elements] = [{}, new WeakMap(), new WeakMap()];
let asking = null; // the timer of a request for runs
const server = { ask: (path) => api.fetchApi(path), address: (path) => api.apiURL(path) };

/**
 * Put an element on a node as its last widget, in either renderer; it is no value of the workflow or the prompt.
 * @param {object} node
 * @param {string} name
 * @param {HTMLElement} element
 * @param {number} height in pixels of the page; the least, where it grows with the node
 * @param {{grows?: boolean, getValue?: () => string, setValue?: (value: string) => void}} options
 */
function addElement(node, name, element, height, { grows = false, ...value } = {}) {
  const widget = node.addDOMWidget(name, "autorefiner", element, {
    ...value,
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
  });
  widget.serialize = false;
  // The Vue renderer lets every widget grow that can tell its least size.
  if (!grows) Object.assign(widget, { computeSize: (width) => [width, height], computeLayoutSize: undefined });
  element.dataset.autorefiner = name;
  elements.set(node, [...(elements.get(node) ?? []), element]);
  element.style.minHeight = `${height - 2 * (widget.margin ?? 0)}px`; // the Vue renderer asks the element alone
}

/**
 * Let a widget hear of an event of its node, by `told(event)`. One that has `restore(state, received)` also gets the
 * latest run of the node that the server holds.
 */
function subscribe(node, event, widget) {
  shown[event] ??= new WeakMap();
  shown[event].set(node, [...(shown[event].get(node) ?? []), widget]);
  if (!widget.restore) return;
  after(node, "onConfigure", () => {
    for (const name of FORMER) delete node.properties?.[name];
    askForRuns();
  });
}

/** Ask the server for the latest runs of all nodes that show some. */
function askForRuns() {
  clearTimeout(asking);
  asking = setTimeout(restoreRuns, PAUSE);
}

/** The widgets that show runs, with their node's ids: a subgraph that is used twice has one node for both. */
function restorable(graph) {
  const found = new Map();
  for (const [id, node] of nodesWithin(graph)) {
    for (const widget of Object.values(shown).flatMap((nodes) => nodes.get(node) ?? [])) {
      if (widget.restore) found.set(widget, [...(found.get(widget) ?? []), id]);
    }
  }
  return [...found].map(([widget, ids]) => ({ widget, ids, received: widget.received }));
}

/** The run that began last of those that nodes show, or null. */
function latest(runs, ids) {
  const known = ids.map((id) => runs[id]).filter(Boolean);
  return known.sort((one, other) => other.run - one.run)[0] ?? null;
}

async function restoreRuns() {
  const graph = app.rootGraph ?? app.graph;
  const widgets = restorable(graph);
  if (!widgets.length) return;
  const nodes = [...new Set(widgets.flatMap(({ ids }) => ids))];
  const asked = { workflow: graph.id, client: api.clientId, nodes };
  const answer = await api
    .fetchApi("/autorefiner/runs", { method: "POST", body: JSON.stringify(asked) })
    .then((response) => response.json())
    .catch(() => null);
  if (!answer?.runs || asked.workflow !== (app.rootGraph ?? app.graph).id) return;
  for (const { widget, ids, received } of widgets) widget.restore(latest(answer.runs, ids), received);
}

/** Give a node room for what it says. */
function addText(node, text) {
  const setValue = (value) => text.say(String(value ?? ""));
  addElement(node, TEXT, text.element, 60, { getValue: () => text.said, setValue });
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
}

function addStrip(node, text) {
  const stop = (node, prompt) =>
    api.fetchApi("/autorefiner/stop", { method: "POST", body: JSON.stringify({ node, prompt }) });
  const strip = new Strip({ stop }, new Steering(node), text);
  addElement(node, "chunks", strip.element, 150);
  subscribe(node, CHUNK, strip);
}

/** Draw a cache again when anything that it is made of has changed. */
function addCacheView(node) {
  const view = new CacheView();
  let [last, busy] = ["", false];
  addElement(node, "memory_view", view.element, 132);
  caches.set(node, async () => {
    const asked = JSON.stringify(askedOf(node));
    if (busy || asked === last) return;
    busy = true;
    const answer = await api.fetchApi("/autorefiner/cache", { method: "POST", body: asked }).catch(() => null);
    const told = await answer?.json().catch(() => null);
    [last, busy] = [answer ? asked : "", false]; // where none came, it is asked again
    view.show(told ?? { error: word("no answer") });
  });
}

/** The Vue renderer shows the elements of a node that an undo replaced: put its successor's in their place. */
function replaceFormer(node) {
  for (const element of elements.get(node) ?? []) {
    if (element.isConnected) continue;
    const place = `[data-node-id="${node.id}"] [data-autorefiner="${element.dataset.autorefiner}"]`;
    document.querySelector(place)?.replaceWith(element);
  }
}

/** Look at the nodes of the graph that is shown. */
function lookAround() {
  if (document.hidden) return;
  for (const node of app.canvas?.graph?.nodes ?? []) {
    replaceFormer(node);
    caches.get(node)?.();
  }
}

function addTrainer(node) {
  const trainer = new Trainer({ address: (path) => api.apiURL(path) });
  addElement(node, "training", trainer.element, 300);
  subscribe(node, TRAIN, trainer);
}

/** Ask for the videos of this workflow's last runs: after the page was loaded, or missed events. */
async function restoreLives() {
  const graph = app.rootGraph ?? app.graph;
  const answer = await api.fetchApi(`/autorefiner/live?workflow=${encodeURIComponent(graph.id)}`).catch(() => null);
  const { videos } = (await answer?.json().catch(() => null)) ?? {};
  for (const video of Array.isArray(videos) ? videos : []) tell(LIVE, video);
}

/** Ask for what the server holds of this workflow: after the page was loaded, or missed events. */
function restore() {
  askForRuns();
  restoreLives();
}

/** Hand an event to what shows its node, unless another workflow was opened since. */
function tell(event, detail) {
  const graph = app.rootGraph ?? app.graph;
  if (detail?.workflow && detail.workflow !== graph.id) return;
  const node = nodeAt(graph, detail?.node);
  for (const widget of (node && shown[event]?.get(node)) ?? []) widget.told(detail);
}

/** Listen to an event of the server. */
function listen(event) {
  api.addEventListener(event, ({ detail }) => tell(event, detail));
}

function addCompare(node) {
  const compare = new Compare((path) => api.apiURL(path));
  addElement(node, "compare", compare.element, 260, { grows: true });
  after(node, "onExecuted", (output) => compare.told(output?.autorefiner_compare));
  after(node, "onRemoved", () => compare.told(null));
}

function watchFormer(node) {
  hideFormer(node);
  node.setSize([node.size[0], node.computeSize()[1]]); // it was measured with the hidden widgets
  after(node, "onConfigure", () => hideFormer(node));
}

function watchLora(node) {
  const widget = node.widgets?.find((widget) => widget.name === "lora_name");
  if (widget) after(widget, "callback", () => warnOfRefiner(node));
  after(node, "onConfigure", () => warnOfRefiner(node));
}

app.registerExtension({
  name: "AutoRefiner.Page",
  setup() {
    addStyles();
    for (const event of [CHUNK, TRAIN, LIVE]) listen(event);
    api.addEventListener("reconnected", restore);
    setInterval(lookAround, LOOK);
  },
  afterConfigureGraph: restore,
  nodeCreated(node) {
    if (node.comfyClass?.startsWith("AutoRefiner") && hasFormer(node)) watchFormer(node);
    const text = TELLING.includes(node.comfyClass) ? new Text() : null;
    if (STRIPS.includes(node.comfyClass)) addStrip(node, text);
    if (STRIPS.includes(node.comfyClass)) subscribe(node, LIVE, addLive(node, server, addElement));
    if (node.comfyClass === "AutoRefinerReflectiveCache") addCacheView(node);
    if (node.comfyClass === "AutoRefinerCompareVideos") addCompare(node);
    if (node.comfyClass === "AutoRefinerTrainRefiner") addTrainer(node);
    if (text) addText(node, text);
    if (LORA_LOADERS.includes(node.comfyClass)) watchLora(node);
  },
});
