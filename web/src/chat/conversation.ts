// A conversation is a tree: editing a question or asking again adds a branch, and nothing is lost.
import type { Receipt, TokenLogprob, Usage } from "../api/types";
import type { SamplingText } from "./sampling";

export interface Question {
  id: string;
  parent: string | null;
  role: "user";
  text: string;
  images: string[]; // data URLs
}

export interface Call {
  name: string;
  arguments: string; // JSON text
}

export interface Answer {
  id: string;
  parent: string;
  role: "assistant";
  model: string; // with its adapter
  isContinuation: boolean; // of a text, by a base model
  reasoning: string;
  text: string;
  calls: Call[];
  state: "running" | "done" | "stopped" | "failed";
  error: string;
  finishReason: string;
  thinkingMs: number;
  numThinkingTokens: number;
  totalMs: number;
  numTokens: number; // thinking included
  usage: Usage | null;
  reasoningTokens: TokenLogprob[]; // empty unless asked for
  textTokens: TokenLogprob[];
  receipt: Receipt | null;
}

export type Turn = Question | Answer;

/** What the next answer is made with. */
export interface Setup {
  model: string;
  adapter: string; // "" is the model as it is
  effort: string;
  system: string;
  sampling: SamplingText;
}

export interface Conversation {
  id: string;
  title: string; // given by the reader; "" shows the first question
  createdAt: number; // milliseconds since 1970
  updatedAt: number;
  setup: Setup;
  turns: Record<string, Turn>;
  head: string | null; // the last turn of the branch in view
}

export const newId = (): string =>
  crypto.randomUUID?.() ?? `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;

export function newConversation(setup: Setup): Conversation {
  const now = Date.now();
  return { id: newId(), title: "", createdAt: now, updatedAt: now, setup, turns: {}, head: null };
}

/** The turns in view, first to last. */
export function branch({ turns, head }: Conversation, end: string | null = head): Turn[] {
  const path: Turn[] = [];
  for (
    let turn = end === null ? undefined : turns[end];
    turn;
    turn = turn.parent === null ? undefined : turns[turn.parent]
  )
    path.unshift(turn);
  return path;
}

/** The turns that stand in one place, oldest first: what was asked there, or answered. */
export function siblings({ turns }: Conversation, turn: Turn): Turn[] {
  return Object.values(turns).filter(({ parent }) => parent === turn.parent);
}

/** The conversation with a turn added at the end of what it follows. */
export function withTurn(conversation: Conversation, turn: Turn): Conversation {
  return {
    ...conversation,
    turns: { ...conversation.turns, [turn.id]: turn },
    head: turn.id,
    updatedAt: Date.now(),
  };
}

/** The conversation with another branch in view: the one through `id`, down to its newest end. */
export function showing(conversation: Conversation, id: string): Conversation {
  let head = id;
  for (;;) {
    const next = Object.values(conversation.turns).findLast(({ parent }) => parent === head);
    if (!next) return { ...conversation, head };
    head = next.id;
  }
}

export function titleOf(conversation: Conversation): string {
  if (conversation.title) return conversation.title;
  const first = Object.values(conversation.turns).find(({ role, parent }) => role === "user" && parent === null);
  const text = first?.text.trim().replace(/\s+/g, " ") ?? "";
  if (first && !text) return "An image";
  return text.length > 70 ? `${text.slice(0, 70).trimEnd()}…` : text || "New conversation";
}
