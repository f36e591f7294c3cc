// Steering a run from its strip: each action edits the sampler's recipe, holds the seed of the run shown, and queues.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { dialog, make } from "./dom.js";
import { source, targets, widgetOf } from "./graph.js";
import { formatRecipe, parseRecipe, steered } from "./recipe.js";
import { phrase, word } from "./words.js";

const INSIDE_GUIDER = "AutoRefinerCustomSampler"; // its seed and prompt are at SamplerCustomAdvanced
const TIMELINE = "AutoRefinerPromptTimeline";
const MOST_EXTENDED = 999; // chunks at once
const LONGEST_PROMPT = 8000; // characters

/** The node and the input by which a sampler gets its seed, and its prompt. */
function inputsOf(node) {
  if (node.comfyClass !== INSIDE_GUIDER) return { seed: [node, "seed"], prompt: [node, "positive"] };
  const around = targets(node)[0];
  return {
    seed: [source(around, "noise"), "noise_seed"],
    prompt: [source(around, "guider"), "conditioning"],
  };
}

/** Set a widget as a user does. */
function set(widget, value) {
  if (!widget || widget.value === value) return;
  widget.value = value;
  widget.callback?.(value);
}

/** Edit the graph as one step of undo, behind what was changed before. */
function asOneChange(edit) {
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker;
  tracker?.captureCanvasState?.();
  tracker?.beforeChange?.();
  try {
    edit();
  } finally {
    tracker?.afterChange?.();
  }
  app.canvas?.setDirty(true, true);
}

/** A recipe in words. */
export function recipeInWords(text) {
  const commands = parseRecipe(text);
  if (!commands) return text;
  return commands
    .map((command) => `${phrase(command.verb, command)}${command.times > 1 ? phrase("times", command) : ""}`)
    .join(", ");
}

export class Steering {
  /** @param {object} node the sampler */
  constructor(node) {
    this.node = node;
    this.words = make("span", { class: "autorefiner-recipe" });
    this.count = make("input", {
      type: "number",
      min: 1,
      max: MOST_EXTENDED,
      value: 1,
      "aria-label": word("chunks to add"),
      title: word("chunks to add"),
      onkeydown: (event) => event.stopPropagation(),
    });
    const button = (name, onclick) => {
      const attributes = { type: "button", class: "autorefiner-stop", title: word(`${name} title`), onclick };
      return make("button", attributes, word(name));
    };
    this.reset = button("clear", () => this.apply([]));
    const extend = make("span", { class: "autorefiner-extend" }, button("extend run", () => this.extend()), this.count);
    this.element = make("div", { class: "autorefiner-foot" }, this.words, extend, this.reset);
    this.element.hidden = true;
  }

  get recipe() {
    return widgetOf(this.node, "recipe");
  }

  /** Show a run: its recipe, and the actions where the sampler has a recipe. */
  show({ known, total, length, recipe, seed }) {
    this.run = { total, length, recipe, seed };
    this.element.hidden = !known || !total || !this.recipe;
    this.words.textContent = recipeInWords(recipe);
    this.words.title = recipe;
    this.reset.hidden = !recipe;
  }

  /** What can be done with a chunk, as [text, action]. */
  choices(chunk) {
    if (!this.recipe || chunk.given) return [];
    const number = chunk.chunk + 1;
    const choices = [[word("reroll here"), () => this.add({ verb: "reroll", number })]];
    if (number < this.run.total) choices.push([word("keep here"), () => this.add({ verb: "keep", number })]);
    if (this.timeline()) choices.push([word("prompt here"), () => this.askForPrompt(chunk)]);
    return choices;
  }

  extend() {
    const number = Math.round(Number(this.count.value));
    if (number >= 1 && number <= MOST_EXTENDED) this.add({ verb: "extend", number });
  }

  /** Add a command to the recipe of the run that is shown. */
  add(command) {
    const commands = parseRecipe(this.run.recipe) ?? [];
    this.apply(steered(commands, command, this.run.total));
  }

  apply(commands) {
    this.queue(() => set(this.recipe, formatRecipe(commands)));
  }

  /** Edit, hold the seed of the run that is shown, and queue. */
  queue(edit) {
    asOneChange(() => {
      edit();
      this.holdSeed();
    });
    app.queuePrompt(0, 1);
  }

  holdSeed() {
    const [owner, name] = inputsOf(this.node).seed;
    const widget = widgetOf(owner, name);
    if (!widget) return;
    if (Number.isSafeInteger(this.run.seed)) set(widget, this.run.seed);
    const holder = [owner, source(owner, name)].find((node) => node?.widgets?.includes(widget));
    const place = holder.widgets.indexOf(widget);
    set(holder.widgets.slice(place).find((each) => each.name === "control_after_generate"), "fixed");
  }

  /** The text widget of the Prompt Timeline that the sampler's prompt comes from, if any. */
  timeline() {
    const [owner, name] = inputsOf(this.node).prompt;
    const node = source(owner, name);
    return node?.comfyClass === TIMELINE ? widgetOf(node, "text") : undefined;
  }

  /** Ask for a prompt that starts with a chunk. */
  askForPrompt(chunk) {
    const text = make("textarea", { rows: 4, maxlength: LONGEST_PROMPT, placeholder: word("new prompt") });
    const problem = make("div", { class: "autorefiner-problem", role: "alert" });
    const button = (name, action) => make("button", { type: "button", onclick: action }, word(name));
    const send = async () => {
      problem.textContent = "";
      const fault = await this.promptFrom(chunk, text.value);
      if (fault) problem.textContent = fault;
      else opened.close();
    };
    const title = `${word("prompt here")}: ${word("chunk")} ${chunk.chunk + 1}`;
    const onkeydown = (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && send();
    const bar = make("div", { class: "autorefiner-bar" }, button("queue", send), button("close", () => opened.close()));
    const opened = dialog({ onkeydown }, make("div", {}, title), text, problem, bar);
    text.focus();
  }

  /** Write a prompt into the timeline; returns what is wrong with it, or "". */
  async promptFrom({ start, before }, prompt) {
    const widget = this.timeline();
    const body = JSON.stringify({ text: widget?.value, prompt, start, before, frames: this.run.length });
    const response = await api.fetchApi("/autorefiner/timeline", { method: "POST", body }).catch(() => null);
    const answer = await response?.json().catch(() => null);
    if (typeof answer?.text !== "string") return String(answer?.error ?? word("no answer")).slice(0, 500);
    this.queue(() => set(widget, answer.text));
    return "";
  }
}
