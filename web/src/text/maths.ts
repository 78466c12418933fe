// Maths between $...$, $$...$$, \(...\) and \[...\], set by KaTeX, which is loaded when the first formula comes.
import type { KatexOptions } from "katex";
import type { MarkedExtension, Tokens } from "marked";
import { escapeHtml } from "./escape";

interface MathsToken extends Tokens.Generic {
  type: "maths" | "mathsBlock";
  tex: string;
  isDisplay: boolean;
}

// A dollar opens only before something that is no space, and closes only behind such and before no digit: $5 and $6.
const INLINE = [/^\$\$([^$]+?)\$\$/, /^\$(?!\s)((?:\\.|[^\\\n$])+?)(?<!\s)\$(?!\d)/, /^\\\((.+?)\\\)/s];
const BLOCK = [/^\$\$\s*([^$]+?)\s*\$\$ *(?:\n|$)/, /^\\\[(.+?)\\\] *(?:\n|$)/s];

function find(patterns: readonly RegExp[], type: MathsToken["type"], text: string): MathsToken | undefined {
  for (const pattern of patterns) {
    const match = pattern.exec(text);
    if (match) {
      const isDisplay = type === "mathsBlock" || match[0].startsWith("$$");
      return { type, raw: match[0], tex: (match[1] ?? "").trim(), isDisplay };
    }
  }
  return undefined;
}

const placeholder = (token: Tokens.Generic): string =>
  `<span class="maths${token.isDisplay ? " maths-display" : ""}" data-tex="${escapeHtml(String(token.tex))}"></span>`;

export const mathsExtension: MarkedExtension = {
  extensions: [
    {
      name: "mathsBlock",
      level: "block",
      start: (text) => text.match(/\$\$|\\\[/)?.index,
      tokenizer: (text) => find(BLOCK, "mathsBlock", text),
      renderer: (token) => `<p>${placeholder(token)}</p>`,
    },
    {
      name: "maths",
      level: "inline",
      start: (text) => text.match(/\$|\\\(/)?.index,
      tokenizer: (text) => find(INLINE, "maths", text),
      renderer: placeholder,
    },
  ],
};

const OPTIONS: KatexOptions = {
  throwOnError: false, // a formula that is wrong, or not yet complete, shows as its source
  errorColor: "inherit",
  strict: "ignore",
  trust: false, // no links, images, classes
  maxSize: 20, // em
  maxExpand: 500,
};

/** Sets the formulas below an element. */
export async function setMaths(root: ParentNode): Promise<void> {
  const places = [...root.querySelectorAll<HTMLElement>(".maths")];
  if (!places.length) return;
  for (const place of places) place.textContent ||= place.dataset.tex ?? "";
  const { typeset } = await import("./typeset");
  for (const place of places) {
    const isDisplay = place.classList.contains("maths-display");
    typeset(place.dataset.tex ?? "", place, { ...OPTIONS, displayMode: isDisplay });
    if (isDisplay && place.scrollWidth > place.clientWidth) {
      place.tabIndex = 0; // it scrolls, by keyboard too
      place.role = "group";
      place.ariaLabel = "Formula";
    }
  }
}
