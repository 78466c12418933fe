// What a screen reader is told while an answer grows: whole sentences, each once.

/** The end of the last whole sentence or line at or behind `from`; `from` if there is none. */
export function endOfSentences(text: string, from: number): number {
  let end = from;
  for (const match of text.slice(from).matchAll(/[.!?:;…](?=\s)|\n/g)) end = from + match.index + match[0].length;
  return end;
}

/** Markdown without its marks. */
export function spoken(text: string): string {
  return text
    .replace(/```[^\n]*/g, "")
    .replace(/!?\[([^\]]*)\]\([^)]*\)/g, "$1")
    .replace(/^\s{0,3}(?:#{1,6}|>)\s+/gm, "")
    .replace(/[*_`~]{1,3}/g, "")
    .trim();
}
