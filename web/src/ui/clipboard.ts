import { notice } from "../chat/store";

const SAY_FOR_MS = 1500;

export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    if (copyBySelection(text)) return true;
    notice.value = { text: "The browser does not let this page copy; select the text and copy it by hand." };
    return false;
  }
}

/** The old way, for pages that come neither by https nor from this machine. */
function copyBySelection(text: string): boolean {
  const area = document.createElement("textarea");
  area.value = text;
  const place = document.querySelector("dialog[open]") ?? document.body; // what lies behind a dialog takes no focus
  place.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  return isDone;
}

/** Copies a text, and lets the button that was pressed say so for a moment. */
export async function copyFrom(button: HTMLButtonElement, text: string): Promise<void> {
  if (!(await copyText(text))) return;
  button.textContent = "Copied";
  setTimeout(() => {
    button.textContent = "Copy";
  }, SAY_FOR_MS);
}

/** Hands a file to the reader. */
export function download(name: string, content: unknown): void {
  const url = URL.createObjectURL(new Blob([`${JSON.stringify(content, null, 2)}\n`], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
