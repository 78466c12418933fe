import { signal, useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { answerAgain } from "../chat/answering";
import type { Answer } from "../chat/conversation";
import { changeSetup, current } from "../chat/store";
import { copyText } from "./clipboard";
import { Icon, IconButton } from "./icons";
import { Prose } from "./prose";
import { showReceipt } from "./receipt";
import { Branches } from "./thread";
import { TokenView } from "./tokens";

/** Whether answers are shown as tokens, where these are known. */
const showsTokens = signal(false);

export function AnswerView({ answer, isThinking }: { answer: Answer; isThinking: boolean }) {
  const isRunning = answer.state === "running";
  const isWaiting = isRunning && !answer.reasoning && !answer.text && !answer.calls.length;
  return (
    <article class="answer" aria-label={`Answer of ${answer.model}`} aria-busy={isRunning}>
      {answer.reasoning && <Thinking answer={answer} isThinking={isThinking} />}
      {isWaiting && (
        <p class="waiting">
          <span class="pulse" /> Reading the question
        </p>
      )}
      <AnswerText answer={answer} />
      {answer.calls.map((call, index) => (
        <div class="code" key={index}>
          <div class="code-head">
            <span>Calls {call.name}</span>
          </div>
          {/* biome-ignore lint/a11y/noNoninteractiveTabindex: it scrolls, by keyboard too */}
          <pre tabIndex={0}>{call.arguments}</pre>
        </div>
      ))}
      <Ending answer={answer} />
      {!isRunning && (answer.text || answer.reasoning ? <Actions answer={answer} /> : <Branches turn={answer} />)}
    </article>
  );
}

function AnswerText({ answer }: { answer: Answer }) {
  if (showsTokens.value && answer.textTokens.length)
    return <TokenView tokens={answer.textTokens} label="Tokens of the answer" />;
  if (answer.isContinuation) return <p class="continuation">{answer.text}</p>;
  return answer.text ? <Prose text={answer.text} /> : null;
}

/** The working, on squared paper; folded, with how long it took. */
function Thinking({ answer, isThinking }: { answer: Answer; isThinking: boolean }) {
  const isOpen = useSignal(false);
  const working = useRef<HTMLDivElement>(null);
  useEffect(() => {
    if (isThinking) working.current?.scrollTo({ top: working.current.scrollHeight });
  }, [answer.reasoning, isOpen.value]);
  const id = `thinking-${answer.id}`;
  const spent = `${seconds(answer.thinkingMs)} · ${count(answer.numThinkingTokens, "token")}`;
  return (
    <div class="thinking">
      <button
        type="button"
        class="thinking-fold"
        aria-expanded={isOpen.value}
        aria-controls={id}
        onClick={() => (isOpen.value = !isOpen.value)}
      >
        <Icon name="right" />
        {isThinking ? "Thinking" : "Thought"} <span class="spent">{isThinking ? spent : `for ${spent}`}</span>
        {isThinking && <span class="pulse" />}
      </button>
      {/* biome-ignore lint/a11y/noNoninteractiveTabindex: it scrolls, by keyboard too */}
      <div id={id} class="working" ref={working} tabIndex={0} hidden={!isOpen.value}>
        {showsTokens.value && answer.reasoningTokens.length ? (
          <TokenView tokens={answer.reasoningTokens} label="Tokens of the thinking" />
        ) : (
          <p>{answer.reasoning}</p>
        )}
      </div>
    </div>
  );
}

/** Why the answer ended, if not of itself. */
function Ending({ answer }: { answer: Answer }) {
  if (answer.state === "failed")
    return (
      <div class="ending ending-failed" role="alert">
        <p>{answer.error}</p>
        <button type="button" class="button" onClick={() => answerAgain(answer.parent)}>
          Try again
        </button>
      </div>
    );
  if (answer.state === "stopped") return <p class="ending">Stopped.</p>;
  if (answer.finishReason === "length") return <p class="ending">It ended at the limit of tokens.</p>;
  return null;
}

function Actions({ answer }: { answer: Answer }) {
  const isCopied = useSignal(false);
  const timer = useRef(0);
  const hasTokens = answer.textTokens.length + answer.reasoningTokens.length > 0;
  const copy = async () => {
    isCopied.value = await copyText(answer.text);
    clearTimeout(timer.current);
    timer.current = window.setTimeout(() => (isCopied.value = false), 1500);
  };
  const askForTokens = () => {
    changeSetup({ sampling: { ...current.value.setup.sampling, hasProbabilities: true } });
    showsTokens.value = true;
    answerAgain(answer.parent);
  };
  return (
    <div class="actions">
      <IconButton
        icon={isCopied.value ? "check" : "copy"}
        label={isCopied.value ? "Copied" : "Copy the answer"}
        onClick={copy}
      />
      <IconButton icon="again" label="Answer again" onClick={() => answerAgain(answer.parent)} />
      {hasTokens ? (
        <IconButton
          icon="tokens"
          label="Token probabilities"
          isPressed={showsTokens.value}
          onClick={() => (showsTokens.value = !showsTokens.value)}
        />
      ) : (
        <IconButton icon="tokens" label="Answer again with token probabilities" onClick={askForTokens} />
      )}
      <IconButton icon="receipt" label="Receipt" onClick={() => showReceipt(answer)} />
      <Branches turn={answer} />
      <Figures answer={answer} />
    </div>
  );
}

function Figures({ answer }: { answer: Answer }) {
  if (!answer.numTokens) return null;
  const cached = answer.usage?.prompt_tokens_details?.cached_tokens;
  const prompt = answer.usage ? `${count(answer.usage.prompt_tokens, "token")} of prompt` : "";
  const title = [answer.model, prompt, cached ? `${cached.toLocaleString("en")} of them known already` : ""];
  return (
    <span class="figures" title={title.filter(Boolean).join(", ")}>
      {count(answer.numTokens, "token")} · {seconds(answer.totalMs)}
    </span>
  );
}

export const count = (number: number, what: string): string =>
  `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;

export function seconds(ms: number): string {
  const s = ms / 1000;
  if (s < 1) return `${Math.round(ms)} ms`;
  if (s < 60) return `${s.toFixed(1)} s`;
  return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
}
