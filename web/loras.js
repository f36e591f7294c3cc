// Core's LoRA loaders take no refiner: its keys match none of a model's, so that it cannot ruin one, and nothing happens.
import { app } from "../../scripts/app.js";
import { word } from "./words.js";

export const LORA_LOADERS = ["LoraLoader", "LoraLoaderModelOnly"];
const REFINER = ".refiner.safetensors";

/** Say on the page where a LoRA loader is given a refiner. */
export function warnOfRefiner(node) {
  const widget = node.widgets?.find((widget) => widget.name === "lora_name");
  if (!String(widget?.value ?? "").endsWith(REFINER)) return;
  app.extensionManager.toast.add({
    severity: "warn",
    summary: "AutoRefiner",
    detail: `${widget.value}: ${word("no lora")}`,
    life: 15000,
  });
}
