// Asking, and the answers that are being given right now.
import { computed, type Signal, signal } from "@preact/signals";
import { ApiError, streamAnswer } from "../api/client";
import type { CallDelta, Choice, Chunk, ContentPart, Message, ModelEntry, TokenLogprob } from "../api/types";
import {
  type Answer,
  branch,
  type Conversation,
  newId,
  type Question,
  type Setup,
  type Turn,
  withTurn,
} from "./conversation";
import { samplingFields } from "./sampling";
import { apiKey, asksForKey, change, current, models } from "./store";

const SHOW_EVERY_MS = 40; // a screen shows no more, and each showing lays the text out anew
const KEEP_EVERY_MS = 1000; // at most so much is lost when the page closes
const NUM_ALTERNATIVES = 5;
const CONTINUATION_TOKENS = 256; // a base model has no end of its own

interface Run {
  conversationId: string;
  answer: Signal<Answer>;
  isThinking: Signal<boolean>;
  abort: AbortController;
}

/** By the id of the answer. */
export const runs = signal<ReadonlyMap<string, Run>>(new Map());

/** The run in the conversation in view, if one is there. */
export const currentRun = computed(() => runOf(current.value.id));

const runOf = (conversationId: string): Run | undefined =>
  [...runs.value.values()].findLast((run) => run.conversationId === conversationId);

export function stop(conversationId: string = current.value.id): void {
  runOf(conversationId)?.abort.abort();
}

/** Adds a question to the conversation in view, and has it answered. */
export function ask(text: string, images: string[], parent: string | null = current.value.head): void {
  const question: Question = { id: newId(), parent, role: "user", text, images };
  const { id } = current.value;
  change(id, (conversation) => withTurn(conversation, question));
  void answer(id, question.id);
}

/** Answers a question of the conversation in view, beside what answers it has. */
export function answerAgain(questionId: string): void {
  void answer(current.value.id, questionId);
}

async function answer(conversationId: string, questionId: string): Promise<void> {
  stop(conversationId);
  const conversation = current.value;
  const model = models.value.find(({ id }) => id === conversation.setup.model);
  if (!model) return;
  const blank = blankAnswer(questionId, conversation.setup, model);
  const run: Run = {
    conversationId,
    answer: signal(blank),
    isThinking: signal(false),
    abort: new AbortController(),
  };
  runs.value = new Map(runs.value).set(blank.id, run);
  change(conversationId, (known) => withTurn(known, blank));
  const request = requestFor(conversation, questionId, model);
  await follow(run, request);
  runs.value = new Map([...runs.value].filter(([id]) => id !== blank.id));
}

/** Reads the stream to its end, whatever that is, and leaves the answer in the conversation. */
async function follow(run: Run, { path, body }: RequestFor): Promise<void> {
  const begin = performance.now();
  const reading = new Reading(run.answer.value, begin);
  let keptAt = Number.NEGATIVE_INFINITY;
  let timer = 0;
  const show = () => {
    timer = 0;
    run.answer.value = reading.soFar(performance.now() - begin);
    run.isThinking.value = reading.isThinking;
    if (performance.now() - keptAt > KEEP_EVERY_MS) {
      keptAt = performance.now();
      save(run);
    }
  };
  try {
    for await (const chunk of streamAnswer(path, body, apiKey.value, run.abort.signal)) {
      reading.take(chunk, performance.now());
      timer ||= window.setTimeout(show, SHOW_EVERY_MS);
    }
    reading.end("done", performance.now());
  } catch (error) {
    reading.end(run.abort.signal.aborted ? "stopped" : "failed", performance.now());
    if (reading.answer.state === "failed")
      reading.answer.error = error instanceof Error ? error.message : String(error);
    if (error instanceof ApiError && error.status === 401) asksForKey.value = true;
  }
  clearTimeout(timer);
  show();
  save(run);
}

function save({ conversationId, answer: { value } }: Run): void {
  change(conversationId, (known) => ({ ...known, turns: { ...known.turns, [value.id]: value } }));
}

/** Puts the chunks of one answer together. */
class Reading {
  readonly answer: Answer;
  isThinking = false;

  constructor(
    blank: Answer,
    private readonly begin: number, // the reader's wait for the answer's first word is all counted as thinking
  ) {
    this.answer = { ...blank, reasoningTokens: [], textTokens: [] };
  }

  soFar(totalMs: number): Answer {
    const { reasoningTokens, textTokens } = this.answer; // these two grow in place
    return { ...this.answer, totalMs, reasoningTokens: [...reasoningTokens], textTokens: [...textTokens] };
  }

  take(chunk: Chunk, now: number): void {
    const { answer } = this;
    for (const choice of chunk.choices ?? []) {
      const reasoning = choice.delta?.reasoning_content ?? "";
      const text = choice.delta?.content ?? choice.text ?? "";
      const [reasoningTokens, textTokens] = tokensOf(choice.logprobs);
      if (reasoning && !answer.text) this.isThinking = true;
      if (text || choice.delta?.tool_calls?.length) this.endThinking(now);
      if (this.isThinking) answer.thinkingMs = now - this.begin;
      // One token a part unless probabilities tell; the server's last word on usage corrects the count.
      answer.numTokens += reasoningTokens.length + textTokens.length || Number(reasoning !== "" || text !== "");
      answer.numThinkingTokens += reasoningTokens.length || Number(reasoning !== "");
      answer.reasoning += reasoning;
      answer.text += text;
      answer.reasoningTokens.push(...reasoningTokens);
      answer.textTokens.push(...textTokens);
      if (choice.delta?.tool_calls) answer.calls = withCalls(answer.calls, choice.delta.tool_calls);
      if (choice.finish_reason) answer.finishReason = choice.finish_reason;
      if (choice.receipt) answer.receipt = choice.receipt;
    }
    if (chunk.usage) {
      answer.usage = chunk.usage;
      answer.numTokens = chunk.usage.completion_tokens;
      answer.numThinkingTokens = chunk.usage.completion_tokens_details?.reasoning_tokens ?? answer.numThinkingTokens;
    }
  }

  end(state: "done" | "stopped" | "failed", now: number): void {
    this.endThinking(now);
    this.answer.state = state;
  }

  private endThinking(now: number): void {
    if (this.isThinking) this.answer.thinkingMs = now - this.begin;
    this.isThinking = false;
  }
}

/** Tokens of the thinking and of the answer, in whichever of the API's two forms they came. */
function tokensOf(logprobs: Choice["logprobs"]): [TokenLogprob[], TokenLogprob[]] {
  if (!logprobs) return [[], []];
  if (!("tokens" in logprobs)) return [logprobs.reasoning ?? [], logprobs.content ?? []];
  const tokens = logprobs.tokens.map((token, index) => ({
    token,
    logprob: logprobs.token_logprobs[index] ?? 0,
    top_logprobs: Object.entries(logprobs.top_logprobs?.[index] ?? {}).map(([other, logprob]) => ({
      token: other,
      logprob,
    })),
  }));
  return [[], tokens];
}

function withCalls(calls: Answer["calls"], deltas: readonly CallDelta[]): Answer["calls"] {
  const next = [...calls];
  for (const { index = next.length, function: part } of deltas) {
    const known = next[index] ?? { name: "", arguments: "" };
    next[index] = { name: known.name + (part?.name ?? ""), arguments: known.arguments + (part?.arguments ?? "") };
  }
  return next;
}

function blankAnswer(parent: string, setup: Setup, model: ModelEntry): Answer {
  return {
    id: newId(),
    parent,
    role: "assistant",
    model: setup.adapter ? `${model.id} + ${setup.adapter}` : model.id,
    isContinuation: model.openbook.is_base,
    reasoning: "",
    text: "",
    calls: [],
    state: "running",
    error: "",
    finishReason: "",
    thinkingMs: 0,
    numThinkingTokens: 0,
    totalMs: 0,
    numTokens: 0,
    usage: null,
    reasoningTokens: [],
    textTokens: [],
    receipt: null,
  };
}

interface RequestFor {
  path: "v1/chat/completions" | "v1/completions";
  body: Record<string, unknown>;
}

/** What to send for a question. A base model continues its text alone; others see all that came before. */
function requestFor(conversation: Conversation, questionId: string, model: ModelEntry): RequestFor {
  const { setup } = conversation;
  const turns = branch(conversation, questionId);
  const { is_base: isBase, has_thinking: hasThinking, efforts } = model.openbook;
  const body: Record<string, unknown> = {
    model: setup.adapter ? `${model.id}:${setup.adapter}` : model.id,
    stream: true,
    stream_options: { include_usage: true },
    ...samplingFields(setup.sampling),
  };
  if (!hasThinking) delete body.thinking_budget;
  if (model.openbook.profile === "exact") body.receipt = true; // elsewhere it would promise nothing
  if (isBase) {
    if (setup.sampling.hasProbabilities) body.logprobs = NUM_ALTERNATIVES;
    return {
      path: "v1/completions",
      body: { max_tokens: CONTINUATION_TOKENS, ...body, prompt: turns.at(-1)?.text ?? "" },
    };
  }
  if (setup.sampling.hasProbabilities) Object.assign(body, { logprobs: true, top_logprobs: NUM_ALTERNATIVES });
  if (efforts.length) body.reasoning_effort = setup.effort;
  const messages = turns.filter((turn, index) => isPart(turn, turns[index + 1])).map(messageOf);
  if (setup.system.trim()) messages.unshift({ role: "system", content: setup.system });
  return { path: "v1/chat/completions", body: { ...body, messages } };
}

/** Whether the model is told: questions that got no answer are left out, but for the last one. */
function isPart(turn: Turn, next: Turn | undefined): boolean {
  return (turn.role === "user" && !next) || (turn.role === "assistant" ? turn : next)?.text !== "";
}

function messageOf(turn: Turn): Message {
  if (turn.role === "assistant") return { role: "assistant", content: turn.text };
  if (!turn.images.length) return { role: "user", content: turn.text };
  const parts: ContentPart[] = turn.images.map((url) => ({ type: "image_url", image_url: { url } }));
  if (turn.text) parts.push({ type: "text", text: turn.text });
  return { role: "user", content: parts };
}
