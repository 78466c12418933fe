import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { currentRun } from "../chat/answering";
import { endOfSentences, spoken } from "../text/speech";

const KEPT_LINES = 40;

/** Reads answers to those who do not see them: out of sight, politely, sentence by sentence. */
export function Announcer() {
  const lines = useSignal<string[]>([]);
  const reading = useRef({ id: "", end: 0, isThinking: false });
  const last = useRef(currentRun.value);
  const run = currentRun.value ?? last.current;
  const answer = run?.answer.value;
  const isThinking = run?.isThinking.value ?? false;

  useEffect(() => {
    last.current = run;
    if (!answer) return;
    const state = reading.current;
    const say = (line: string) => {
      if (line) lines.value = [...lines.value, line].slice(-KEPT_LINES);
    };
    if (state.id !== answer.id) {
      reading.current = { id: answer.id, end: 0, isThinking: false };
      lines.value = [];
    }
    const now = reading.current;
    if (isThinking && !now.isThinking) say("Thinking.");
    now.isThinking = isThinking;
    const isOver = answer.state !== "running";
    const end = isOver ? answer.text.length : endOfSentences(answer.text, now.end);
    say(spoken(answer.text.slice(now.end, end)));
    now.end = end;
    if (answer.state === "stopped") say("Stopped.");
    if (isOver) last.current = undefined;
  }, [answer, isThinking]);

  return (
    <div class="unseen" role="log" aria-live="polite" aria-label="Answer, read out">
      {lines.value.map((line, index) => (
        <p key={index}>{line}</p>
      ))}
    </div>
  );
}
