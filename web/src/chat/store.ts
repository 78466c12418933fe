// What the page knows: models, conversations and the one in view. Components read the signals, and change them by the
// functions below only.
import { computed, effect, signal, untracked } from "@preact/signals";
import { ApiError, listModels } from "../api/client";
import type { ModelEntry } from "../api/types";
import { type Answer, type Conversation, newConversation, type Setup } from "./conversation";
import * as database from "./database";
import { remember, remembered } from "./memory";
import { NO_SAMPLING } from "./sampling";

export const models = signal<ModelEntry[]>([]);
export const serverFault = signal<ApiError | null>(null); // why there are no models
export const asksForKey = signal(false); // the server has refused us for want of one
export const apiKey = signal(remembered("api-key", ""));
export const notice = signal<{ text: string; undo?: () => void } | null>(null); // one line for the reader

/** All that were begun, newest first. */
export const conversations = signal<Conversation[]>([]);
const draft = signal<Conversation>(newConversation(firstSetup()));
const currentId = signal(location.hash.slice(1));

/** The one in view; not among `conversations` before its first question. */
export const current = computed(() => conversations.value.find(({ id }) => id === currentId.value) ?? draft.value);

export const currentModel = computed(() => models.value.find(({ id }) => id === current.value.setup.model));

/** Reads what the browser kept, then asks for the models. */
export async function start(): Promise<void> {
  addEventListener("hashchange", () => {
    currentId.value = location.hash.slice(1);
  });
  tabs?.addEventListener("message", ({ data }) => void adopt(data as string));
  try {
    const kept = await database.readAll();
    conversations.value = kept.map(interrupted).sort((a, b) => b.updatedAt - a.updatedAt);
  } catch {
    notice.value = { text: "This browser keeps no data for this page: conversations are lost when it closes." };
  }
  // A conversation goes on with another model if its own is no longer served.
  effect(() => {
    if (models.value.length && !currentModel.value) untracked(() => changeSetup({}));
  });
  await loadModels();
}

export async function loadModels(): Promise<void> {
  try {
    models.value = await listModels(apiKey.value);
    serverFault.value = null;
    asksForKey.value = false;
  } catch (error) {
    serverFault.value = error instanceof ApiError ? error : new ApiError(String(error), 0);
    asksForKey.value = serverFault.value.status === 401;
  }
}

export function enterKey(key: string): Promise<void> {
  apiKey.value = key;
  remember("api-key", key);
  return loadModels();
}

/** Shows a conversation; the address names it, so that going back and reloading work. */
export function open(id: string): void {
  location.hash = id;
  currentId.value = id;
}

export function openNew(): void {
  draft.value = newConversation({ ...current.value.setup, system: "" });
  open("");
}

/** Changes a conversation and keeps it. The first turn makes the draft one of the conversations. */
export function change(id: string, edit: (conversation: Conversation) => Conversation): void {
  const known = conversations.value.find((conversation) => conversation.id === id);
  if (!known && draft.value.id !== id) return; // deleted meanwhile
  const edited = edit(known ?? draft.value);
  if (edited.head === null) {
    draft.value = edited;
    return;
  }
  place(edited);
  if (!known) open(id);
  void keep(edited);
}

/** Puts a conversation among the others, in place of its former self. */
function place(conversation: Conversation): void {
  const others = conversations.value.filter(({ id }) => id !== conversation.id);
  conversations.value = [conversation, ...others].sort((a, b) => b.updatedAt - a.updatedAt);
}

async function keep(conversation: Conversation): Promise<void> {
  try {
    await database.write(conversation);
    tabs?.postMessage(conversation.id);
  } catch {
    notice.value = { text: "The browser could not keep this conversation: its storage is full or closed." };
  }
}

export function changeSetup(edit: Partial<Setup>): void {
  const { id, setup } = current.value;
  const next = { ...setup, ...edit };
  const model = models.value.find((entry) => entry.id === next.model) ?? models.value[0];
  if (model) {
    const { adapters, efforts } = model.openbook;
    next.model = model.id;
    if (!adapters.includes(next.adapter)) next.adapter = "";
    if (!efforts.includes(next.effort)) next.effort = efforts.includes("medium") ? "medium" : (efforts[0] ?? "");
    remember("setup", { ...next, system: "" });
  }
  change(id, (conversation) => ({ ...conversation, setup: next }));
}

export function discard(id: string): void {
  const gone = conversations.value.find((conversation) => conversation.id === id);
  if (!gone) return;
  conversations.value = conversations.value.filter((conversation) => conversation !== gone);
  if (currentId.value === id) openNew();
  void database.remove(id).then(() => tabs?.postMessage(id));
  const undo = () => {
    place(gone);
    void keep(gone);
    open(id);
  };
  notice.value = { text: "Conversation deleted.", undo };
}

function firstSetup(): Setup {
  const empty = { model: "", adapter: "", effort: "", system: "", sampling: NO_SAMPLING };
  const kept = remembered<Partial<Setup>>("setup", {});
  return { ...empty, ...kept, sampling: { ...NO_SAMPLING, ...kept.sampling } };
}

/** An answer that was running when the page closed is as far as it got. */
function interrupted(conversation: Conversation): Conversation {
  const turns = Object.entries(conversation.turns).map(([id, turn]) => {
    const isCut = turn.role === "assistant" && turn.state === "running";
    return [id, isCut ? ({ ...turn, state: "stopped" } satisfies Answer) : turn] as const;
  });
  return { ...conversation, turns: Object.fromEntries(turns) };
}

// Other tabs of this page: each says which conversation it has written or removed.
const tabs = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel("openbook");

async function adopt(id: string): Promise<void> {
  const kept = await database.read(id).catch(() => undefined);
  if (kept) place(kept);
  else conversations.value = conversations.value.filter((conversation) => conversation.id !== id);
}
