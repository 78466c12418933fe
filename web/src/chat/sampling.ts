// How tokens are chosen. A field left empty is not sent: the model's own default holds.

export type SamplingName = "temperature" | "top_p" | "top_k" | "min_p" | "max_tokens" | "thinking_budget" | "seed";

/** What stands in the panel, as it was typed. */
export interface SamplingText extends Record<SamplingName, string> {
  stop: string; // one a line
  hasProbabilities: boolean;
}

export interface Field {
  name: SamplingName;
  label: string;
  help: string;
  unset: string; // what holds without it
  isWhole: boolean;
  min: number;
  max: number;
  step: number;
}

export const FIELDS: readonly Field[] = [
  {
    name: "temperature",
    label: "Temperature",
    help: "0 takes the likeliest token; higher is more varied",
    unset: "model's own",
    isWhole: false,
    min: 0,
    max: 2,
    step: 0.05,
  },
  {
    name: "top_p",
    label: "Top-p",
    help: "keep the likeliest tokens up to this sum of probabilities",
    unset: "model's own",
    isWhole: false,
    min: 0.01,
    max: 1,
    step: 0.01,
  },
  {
    name: "top_k",
    label: "Top-k",
    help: "keep so many tokens; 0 keeps all",
    unset: "model's own",
    isWhole: true,
    min: 0,
    max: 1_000_000,
    step: 1,
  },
  {
    name: "min_p",
    label: "Min-p",
    help: "keep tokens at least this share as likely as the likeliest",
    unset: "model's own",
    isWhole: false,
    min: 0,
    max: 1,
    step: 0.01,
  },
  {
    name: "max_tokens",
    label: "Most tokens",
    help: "of one answer, thinking included",
    unset: "up to the context",
    isWhole: true,
    min: 1,
    max: 10_000_000,
    step: 1,
  },
  {
    name: "thinking_budget",
    label: "Thinking budget",
    help: "tokens of thinking, then the answer begins",
    unset: "no limit",
    isWhole: true,
    min: 0,
    max: 10_000_000,
    step: 1,
  },
  {
    name: "seed",
    label: "Seed",
    help: "the same seed gives the same answer",
    unset: "new each time",
    isWhole: true,
    min: 0,
    max: Number.MAX_SAFE_INTEGER,
    step: 1,
  },
];

export const NO_SAMPLING: SamplingText = {
  temperature: "",
  top_p: "",
  top_k: "",
  min_p: "",
  max_tokens: "",
  thinking_budget: "",
  seed: "",
  stop: "",
  hasProbabilities: false,
};

/** What is wrong with a field's text, or "". */
export function fault(field: Field, text: string): string {
  if (text.trim() === "") return "";
  const value = Number(text);
  const isRight = Number.isFinite(value) && value >= field.min && value <= field.max;
  if (isRight && (!field.isWhole || Number.isInteger(value))) return "";
  const kind = field.isWhole ? "a whole number" : "a number";
  return field.max >= 1_000_000
    ? `Expected ${kind}, ${field.min} or more`
    : `Expected ${kind} from ${field.min} to ${field.max}`;
}

/** The stop strings; `\n` and `\t` stand for what they usually do. */
export function stopStrings(text: string): string[] {
  const unescaped = (line: string) =>
    line.replace(/\\([nt\\])/g, (_, mark) => ({ n: "\n", t: "\t" })[mark as string] ?? mark);
  return text
    .split("\n")
    .filter((line) => line !== "")
    .map(unescaped);
}

export const hasFault = (sampling: SamplingText): boolean =>
  FIELDS.some((field) => fault(field, sampling[field.name]) !== "");

/** How many settings differ from the model's own. */
export const numChosen = (sampling: SamplingText): number =>
  FIELDS.filter(({ name }) => sampling[name].trim()).length +
  Number(sampling.stop !== "") +
  Number(sampling.hasProbabilities);

/** The request's fields for what was chosen. */
export function samplingFields(sampling: SamplingText): Record<string, number | string[]> {
  const fields: Record<string, number | string[]> = {};
  for (const { name } of FIELDS) if (sampling[name].trim()) fields[name] = Number(sampling[name]);
  const stop = stopStrings(sampling.stop);
  if (stop.length) fields.stop = stop;
  return fields;
}
