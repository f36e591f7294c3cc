// What the pack adds to ComfyUI's page: widgets on its nodes, through the page's own extension interface.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { askedOf } from "./asked.js";
import { CacheView } from "./cache.js";
import { Compare } from "./compare.js";
import { addStyles } from "./dom.js";
import { hasFormer, hideFormer } from "./former.js";
import { nodeAt } from "./graph.js";
import { addLive } from "./live.js";
import { LORA_LOADERS, warnOfRefiner } from "./loras.js";
import { Strip } from "./strip.js";
import { Trainer } from "./trainer.js";
import { word } from "./words.js";

const STRIPS = ["AutoRefinerSampler", "AutoRefinerCustomSampler"];
const PROPERTY = "autorefiner_chunks";
const TRAINING = "autorefiner_training";
const LOOK = 600; // milliseconds between two looks at what a cache is connected to

/** What listens to the server's events, and looks at caches, by node; a node that leaves the graph leaves this too. */
const [strips, trainers, caches] = [new WeakMap(), new WeakMap(), new WeakMap()];
const lives = new WeakMap();
const server = { ask: (path) => api.fetchApi(path), address: (path) => api.apiURL(path) };

/**
 * Put an element on a node as its last widget, in either renderer; it is no value of the workflow or the prompt.
 * @param {object} node
 * @param {string} name
 * @param {HTMLElement} element
 * @param {number} height in pixels of the page, at least
 */
function addElement(node, name, element, height) {
  const widget = node.addDOMWidget(name, "autorefiner", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false;
  element.style.minHeight = `${height - 2 * (widget.margin ?? 0)}px`; // the Vue renderer asks the element alone
}

/** Call a function after one that a node may already have by that name. */
function after(node, name, more) {
  const own = node[name];
  node[name] = function (...given) {
    const result = own?.apply(this, given);
    more.apply(this, given);
    return result;
  };
}

function addStrip(node) {
  const strip = new Strip({
    stop: (node, prompt) =>
      api.fetchApi("/autorefiner/stop", { method: "POST", body: JSON.stringify({ node, prompt }) }),
    keep: (kept) => (node.properties[PROPERTY] = kept),
  });
  addElement(node, "chunks", strip.element, 118);
  after(node, "onConfigure", () => strip.restore(node.properties[PROPERTY]));
  strips.set(node, strip);
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

/** Look at the caches of the graph that is shown. */
function lookAtCaches() {
  if (document.hidden) return;
  for (const node of app.canvas?.graph?.nodes ?? []) caches.get(node)?.();
}

function addTrainer(node) {
  const trainer = new Trainer({
    address: (path) => api.apiURL(path),
    keep: (kept) => (node.properties[TRAINING] = kept),
  });
  addElement(node, "training", trainer.element, 300);
  after(node, "onConfigure", () => trainer.restore(node.properties[TRAINING]));
  trainers.set(node, trainer);
}

/** Ask for the videos of this workflow's last runs: after the page was loaded, or missed events. */
async function restoreLives() {
  const graph = app.rootGraph ?? app.graph;
  const answer = await api.fetchApi(`/autorefiner/live?workflow=${encodeURIComponent(graph.id)}`).catch(() => null);
  const { videos } = (await answer?.json().catch(() => null)) ?? {};
  for (const video of Array.isArray(videos) ? videos : []) lives.get(nodeAt(graph, video?.node))?.told(video);
}

/** Hand an event of the server to what shows its node, unless another workflow was opened since. */
function listen(event, shown) {
  api.addEventListener(event, ({ detail }) => {
    const graph = app.rootGraph ?? app.graph;
    if (detail?.workflow && detail.workflow !== graph.id) return;
    const node = nodeAt(graph, detail?.node);
    shown.get(node)?.told(detail);
  });
}

function addCompare(node) {
  const compare = new Compare((path) => api.apiURL(path));
  addElement(node, "compare", compare.element, 260);
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
    listen("autorefiner.chunk", strips);
    listen("autorefiner.train", trainers);
    listen("autorefiner.live", lives);
    api.addEventListener("reconnected", restoreLives);
    setInterval(lookAtCaches, LOOK);
  },
  afterConfigureGraph: () => void restoreLives(),
  nodeCreated(node) {
    if (node.comfyClass?.startsWith("AutoRefiner") && hasFormer(node)) watchFormer(node);
    if (STRIPS.includes(node.comfyClass)) addStrip(node);
    if (STRIPS.includes(node.comfyClass)) lives.set(node, addLive(node, server));
    if (node.comfyClass === "AutoRefinerReflectiveCache") addCacheView(node);
    if (node.comfyClass === "AutoRefinerCompareVideos") addCompare(node);
    if (node.comfyClass === "AutoRefinerTrainRefiner") addTrainer(node);
    if (LORA_LOADERS.includes(node.comfyClass)) watchLora(node);
  },
});
