// From a model's text to what stands on the page. A model's text is not to be trusted: HTML in it is shown as the text
// it is, what is left goes through DOMPurify, and the server's content security policy stands behind both.
import DOMPurify from "dompurify";
import { Marked, type Token } from "marked";
import { escapeHtml } from "./escape";
import { mathsExtension } from "./maths";

/** Tags without attributes that models use for want of a mark. */
const HARMLESS = /^<\/?(?:br|sub|sup|kbd|b|i|em|strong|u|s|mark)\s*\/?>$/i;

const marked = new Marked(
  {
    gfm: true,
    breaks: true, // a line of a worked solution is a line
    renderer: {
      html: ({ text }) => (HARMLESS.test(text.trim()) ? text : escapeHtml(text)),
      // Nothing is loaded: an address in an answer may carry what was said to somebody else.
      image: ({ href, text }) => `<a href="${escapeHtml(href)}">${escapeHtml(text || href)}</a>`,
      checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    },
  },
  mathsExtension,
);

const ALLOWED = {
  ALLOWED_TAGS: [
    ...["h1", "h2", "h3", "h4", "h5", "h6", "p", "br", "hr", "blockquote", "pre", "ol", "ul", "li"],
    ...["table", "thead", "tbody", "tr", "th", "td"],
    ...["a", "b", "code", "del", "em", "i", "kbd", "mark", "s", "span", "strong", "sub", "sup", "u"],
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align", "class", "data-tex"],
  ADD_URI_SAFE_ATTR: ["start", "align", "data-tex"], // of the rest, a value must be an address
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true as const,
};

/** The parts of a text that are laid out on their own: paragraphs, lists, code ... Those that come last may yet change. */
export function blocksOf(text: string): Token[] {
  return marked.lexer(text).filter(({ type }) => type !== "space" && type !== "def");
}

/** One block, ready to be put on the page but for its maths, which are left as `<span class="maths" data-tex=...>`. */
export function layOut(block: Token): DocumentFragment {
  const fragment = DOMPurify.sanitize(marked.parser([block]), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = element("div", "table-frame");
    frame.tabIndex = 0; // wide tables scroll, by keyboard too
    frame.role = "group";
    frame.ariaLabel = "Table";
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) frameCode(pre);
  return fragment;
}

/** Puts a block of code under a line with its language and a button to copy it. */
function frameCode(pre: HTMLPreElement): void {
  const language = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "";
  const frame = element("div", "code");
  const head = element("div", "code-head");
  const copy = element("button", "code-copy");
  head.append(element("span", "code-language", language), copy);
  copy.type = "button";
  copy.textContent = "Copy";
  copy.ariaLabel = "Copy the code";
  pre.tabIndex = 0;
  pre.role = "group";
  pre.ariaLabel = language ? `Code in ${language}` : "Code";
  pre.replaceWith(frame);
  frame.append(head, pre);
}

function element<Name extends keyof HTMLElementTagNameMap>(
  name: Name,
  className: string,
  text = "",
): HTMLElementTagNameMap[Name] {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}
