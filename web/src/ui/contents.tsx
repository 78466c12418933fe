import { signal, useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { runs, stop } from "../chat/answering";
import { type Conversation, titleOf } from "../chat/conversation";
import { change, conversations, current, discard, open, openNew } from "../chat/store";
import { download } from "./clipboard";
import { focusQuestion } from "./composer";
import { BookMark, Icon } from "./icons";
import { ContentsButton, Menu } from "./menu";
import { ThemeButton } from "./theme";

/** Where it lies over the page, on narrow screens. */
export const isContentsOpen = signal(false);

const close = () => {
  isContentsOpen.value = false;
};

/** The left page: all conversations, as a table of contents. */
export function Contents() {
  const running = new Set([...runs.value.values()].map(({ conversationId }) => conversationId));
  return (
    <nav id="contents" class={`contents ${isContentsOpen.value ? "contents-open" : ""}`} aria-label="Conversations">
      <header class="brand">
        <BookMark />
        <span class="brand-name">Openbook</span>
        <ContentsButton isOpen onClick={close} />
      </header>
      <button
        type="button"
        class="button new"
        onClick={() => {
          openNew();
          close();
          focusQuestion();
        }}
      >
        <Icon name="plus" /> New conversation
      </button>
      <h2>Contents</h2>
      {conversations.value.length === 0 && <p class="hint">What you ask is kept here, in this browser only.</p>}
      <ol>
        {conversations.value.map((conversation) => (
          <Entry key={conversation.id} conversation={conversation} isRunning={running.has(conversation.id)} />
        ))}
      </ol>
      <footer>
        <ThemeButton />
        {conversations.value.length > 0 && (
          <button
            type="button"
            class="quiet"
            onClick={() => download("openbook-conversations.json", conversations.value)}
          >
            <Icon name="download" /> Export all
          </button>
        )}
      </footer>
    </nav>
  );
}

function Entry({ conversation, isRunning }: { conversation: Conversation; isRunning: boolean }) {
  const isRenamed = useSignal(false);
  const title = titleOf(conversation);
  const isCurrent = conversation.id === current.value.id;
  if (isRenamed.value) return <Renaming conversation={conversation} onClose={() => (isRenamed.value = false)} />;
  return (
    <li class={isCurrent ? "entry entry-current" : "entry"}>
      <a
        href={`#${conversation.id}`}
        aria-current={isCurrent ? "page" : undefined}
        onClick={(event) => {
          event.preventDefault();
          open(conversation.id);
          close();
        }}
      >
        <span class="entry-title">{title}</span>
        <span class="leader" />
        <span class="entry-date">
          {isRunning ? <span class="pulse" title="Answering" /> : day(conversation.updatedAt)}
        </span>
      </a>
      <Menu
        label={`More for ${title}`}
        items={[
          { icon: "pencil", label: "Rename", onChoose: () => (isRenamed.value = true) },
          {
            icon: "download",
            label: "Export as JSON",
            onChoose: () => download(`${fileName(title)}.json`, conversation),
          },
          {
            icon: "trash",
            label: "Delete",
            onChoose: () => {
              stop(conversation.id);
              discard(conversation.id);
            },
          },
        ]}
      />
    </li>
  );
}

function Renaming({ conversation, onClose }: { conversation: Conversation; onClose: () => void }) {
  const field = useRef<HTMLInputElement>(null);
  const isOver = useRef(false); // the field also loses the focus as it goes
  useEffect(() => {
    field.current?.focus();
    field.current?.select();
  }, []);
  const end = (title?: string) => {
    if (isOver.current) return;
    isOver.current = true;
    if (title !== undefined) change(conversation.id, (known) => ({ ...known, title: title.trim() }));
    onClose();
  };
  return (
    <li class="entry entry-current">
      <input
        ref={field}
        aria-label="Name of the conversation"
        defaultValue={titleOf(conversation)}
        onBlur={({ currentTarget }) => end(currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === "Enter") end(event.currentTarget.value);
          if (event.key === "Escape") {
            event.stopPropagation();
            end();
          }
        }}
      />
    </li>
  );
}

const fileName = (title: string): string =>
  title
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 40) || "conversation";

function day(at: number): string {
  const date = new Date(at);
  const now = new Date();
  if (date.toDateString() === now.toDateString())
    return date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  const isThisYear = date.getFullYear() === now.getFullYear();
  return date.toLocaleDateString("en-GB", {
    day: "numeric",
    month: "short",
    ...(isThisYear ? {} : { year: "numeric" }),
  });
}
