import { useEffect } from "preact/hooks";
import { currentRun, stop } from "../chat/answering";
import { titleOf } from "../chat/conversation";
import { current, currentModel, models, notice } from "../chat/store";
import { Announcer } from "./announcer";
import { AdapterChoice, ModelChoice } from "./choice";
import { Composer, focusQuestion } from "./composer";
import { Contents, isContentsOpen } from "./contents";
import { Gate, KeyDialog } from "./gate";
import { IconButton } from "./icons";
import { ContentsButton } from "./menu";
import { Opening } from "./opening";
import { ReceiptDialog } from "./receipt";
import { isSettingsOpen, Settings } from "./settings";
import { Thread } from "./thread";

const NOTICE_MS = 8000;

export function App() {
  const isNew = current.value.head === null;
  useEffect(() => {
    const press = (event: KeyboardEvent) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
      if (isContentsOpen.value) isContentsOpen.value = false;
      else if (currentRun.value) stop();
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, []);
  useEffect(() => {
    document.title = isNew ? "Openbook" : `${titleOf(current.value)} – Openbook`;
  });
  return (
    <>
      {/* biome-ignore lint/a11y/useValidAnchor: it leads to a place on the page, as links do */}
      <a
        class="skip"
        href="#question"
        onClick={(event) => {
          event.preventDefault(); // the address names the conversation
          focusQuestion();
        }}
      >
        Skip to the question
      </a>
      <div class="book">
        <Contents />
        {isContentsOpen.value && (
          // biome-ignore lint/a11y/noStaticElementInteractions: Esc and the button in the contents do the same
          // biome-ignore lint/a11y/useKeyWithClickEvents: likewise
          <div class="veil" onClick={() => (isContentsOpen.value = false)} />
        )}
        <main class="page">
          <Header />
          {isNew ? models.value.length ? <Opening /> : <Gate /> : <Thread />}
          <Notice />
          <Composer />
        </main>
      </div>
      <Settings />
      <ReceiptDialog />
      <KeyDialog />
      <Announcer />
    </>
  );
}

function Header() {
  const isNew = current.value.head === null;
  const title = titleOf(current.value);
  return (
    <header class="page-head">
      <ContentsButton isOpen={false} onClick={() => (isContentsOpen.value = true)} />
      {isNew ? <span class="page-title" /> : <h1 class="page-title">{title}</h1>}
      {currentModel.value && (
        <>
          <ModelChoice isLabelled={false} />
          <AdapterChoice isLabelled={false} />
          <IconButton icon="sliders" label="Settings" onClick={() => (isSettingsOpen.value = true)} />
        </>
      )}
    </header>
  );
}

/** One line above the question, for a while. */
function Notice() {
  const shown = notice.value;
  useEffect(() => {
    if (!shown) return;
    const timer = setTimeout(() => (notice.value = null), NOTICE_MS);
    return () => clearTimeout(timer);
  }, [shown]);
  return (
    <div role="status">
      {shown && (
        <div class="notice">
          <span>{shown.text}</span>
          {shown.undo && (
            <button
              type="button"
              onClick={() => {
                shown.undo?.();
                notice.value = null;
              }}
            >
              Undo
            </button>
          )}
          <IconButton icon="close" label="Close" onClick={() => (notice.value = null)} />
        </div>
      )}
    </div>
  );
}
