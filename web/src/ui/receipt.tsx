import { signal, useSignal } from "@preact/signals";
import type { Answer } from "../chat/conversation";
import { currentModel } from "../chat/store";
import { copyText, download } from "./clipboard";
import { Dialog } from "./dialog";
import { Icon } from "./icons";

const shown = signal<Answer | null>(null);

export function showReceipt(answer: Answer): void {
  shown.value = answer;
}

/** What it takes to compute one answer again. */
export function ReceiptDialog() {
  const answer = shown.value;
  if (!answer) return null;
  return (
    <Dialog title="Receipt" class="receipt" onClose={() => (shown.value = null)}>
      {answer.receipt ? <Given receipt={answer.receipt} /> : <Missing />}
    </Dialog>
  );
}

function Given({ receipt }: { receipt: Record<string, unknown> }) {
  const isCopied = useSignal(false);
  const copy = async () => {
    isCopied.value = await copyText(JSON.stringify(receipt, null, 2));
  };
  return (
    <>
      <p>
        This is all that is needed to compute the answer again, to the last bit: which weights, which arithmetic, which
        prompt and settings, and a digest of what came out. Whoever has the same model can check it:
      </p>
      <pre class="command">
        <code>openbook verify receipt.json</code>
      </pre>
      <dl class="receipt-lines">
        {linesOf(receipt).map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
      <div class="row">
        <button type="button" class="button" onClick={copy}>
          <Icon name={isCopied.value ? "check" : "copy"} /> {isCopied.value ? "Copied" : "Copy as JSON"}
        </button>
        <button type="button" class="button button-main" onClick={() => download("receipt.json", receipt)}>
          <Icon name="download" /> Download receipt.json
        </button>
      </div>
    </>
  );
}

function Missing() {
  const profile = currentModel.value?.openbook.profile;
  return (
    <>
      <p>
        This answer has no receipt. A receipt names the weights, the arithmetic, the prompt, the settings and the
        output, so that anyone can compute the answer again. It comes with complete answers of a model in the exact
        profile, without images or adapters{profile !== "exact" ? `; this one is served in the profile ${profile}` : ""}
        .
      </p>
      <pre class="command">
        <code>openbook serve --profile exact</code>
      </pre>
    </>
  );
}

const SHOWN_ITEMS = 8; // of a list; the file has them all

/** Names and values, those inside others as `outer.inner`. */
function linesOf(value: Record<string, unknown>, prefix = ""): [string, string][] {
  return Object.entries(value).flatMap(([name, part]): [string, string][] => {
    if (part === null || (Array.isArray(part) && !part.length)) return [];
    if (Array.isArray(part)) return [[prefix + name, inShort(part)]];
    if (typeof part === "object") return linesOf(part as Record<string, unknown>, `${prefix}${name}.`);
    return [[prefix + name, String(part)]];
  });
}

function inShort(items: unknown[]): string {
  const shown = items
    .slice(0, SHOWN_ITEMS)
    .map((item) => (typeof item === "object" ? JSON.stringify(item) : String(item)));
  return items.length > SHOWN_ITEMS
    ? `${shown.join(" ")} … (${items.length.toLocaleString("en")} in all)`
    : shown.join(" ");
}
