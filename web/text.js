// What a node says of its run, below its widgets: of a fixed height, so that a run does not change the node's size.
import { make, ownPointer } from "./dom.js";

/** The page fills a widget of this name with a node's text where there is one; else it adds one, and the node grows. */
export const TEXT = "$$node-text-preview";

export class Text {
  constructor() {
    this.said = ""; // by the server during this node's run
    this.noticed = ""; // of a run that is shown here: after a reload, or where another node ran
    this.element = ownPointer(make("div", { class: "autorefiner-text" }));
  }

  /** @param {string} text */
  say(text) {
    this.said = text;
    this.draw();
  }

  /** @param {string[]} notices of the run that a strip shows */
  notice(notices) {
    this.noticed = notices.join("\n");
    this.draw();
  }

  draw() {
    this.element.textContent = this.said || this.noticed;
  }
}
