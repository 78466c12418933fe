import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { ask, currentRun, runs } from "../chat/answering";
import { type Answer, branch, type Question, showing, siblings, type Turn } from "../chat/conversation";
import { change, current } from "../chat/store";
import { AnswerView } from "./answer";
import { grow } from "./composer";
import { Icon, IconButton } from "./icons";

const NEAR_PX = 80; // so close to the foot counts as reading along

/** The conversation in view. It follows what is being written, unless the reader has scrolled away. */
export function Thread() {
  const frame = useRef<HTMLDivElement>(null);
  const isAway = useSignal(false);
  const scrolledTo = useRef(0);
  const isSettled = useRef(false); // nothing more comes, neither words nor formulas: the reader goes on
  const turns = branch(current.value);
  const { id, head } = current.value;

  const toFoot = () => {
    isAway.value = false;
    frame.current?.scrollTo({ top: frame.current.scrollHeight });
  };
  const look = () => {
    if (!frame.current) return; // closed meanwhile
    const { scrollHeight, scrollTop, clientHeight } = frame.current;
    isAway.value = scrollHeight - scrollTop - clientHeight > NEAR_PX;
  };
  const scroll = () => {
    const before = scrolledTo.current;
    scrolledTo.current = frame.current?.scrollTop ?? 0;
    // Only who goes up goes away: the foot may have moved on since we went there.
    if (isAway.value || scrolledTo.current < before) look();
  };

  useEffect(() => {
    isSettled.current = false;
    toFoot();
  }, [id, head]);
  useEffect(() => {
    const content = frame.current?.firstElementChild;
    if (!content) return;
    const observer = new ResizeObserver(() => {
      if (isAway.value || isSettled.current) look();
      else toFoot();
    });
    observer.observe(content);
    return () => observer.disconnect();
  }, []);

  // What the reader presses may open something, which should then stay where it is.
  const settle = () => {
    isSettled.current = !currentRun.value;
  };

  return (
    // biome-ignore lint/a11y/noStaticElementInteractions: it notices that a part of it is used
    <div class="thread" ref={frame} onScroll={scroll} onPointerDown={settle} onKeyDown={settle}>
      <ol class="turns" aria-label="Conversation">
        {turns.map((turn, index) => (
          <li key={turn.id} class={`turn turn-${turn.role}`}>
            {turn.role === "user" ? (
              <QuestionView question={turn} number={Math.floor(index / 2) + 1} />
            ) : (
              <RunningOrDone answer={turn} />
            )}
          </li>
        ))}
      </ol>
      {isAway.value && (
        <button type="button" class="to-foot" onClick={toFoot}>
          <Icon name="down" /> To the end
        </button>
      )}
    </div>
  );
}

/** Reads the running answer here, so that new words lay out nothing but that answer. */
function RunningOrDone({ answer }: { answer: Answer }) {
  const run = runs.value.get(answer.id);
  return <AnswerView answer={run?.answer.value ?? answer} isThinking={run?.isThinking.value ?? false} />;
}

function QuestionView({ question, number }: { question: Question; number: number }) {
  const isEdited = useSignal(false);
  if (isEdited.value) return <QuestionEditor question={question} onClose={() => (isEdited.value = false)} />;
  return (
    <section class="question" aria-label={`Question ${number}`}>
      <span class="number" aria-hidden="true">
        {number}
      </span>
      {question.images.length > 0 && (
        <div class="pictures">
          {question.images.map((url, index) => (
            <img key={url.slice(-64)} src={url} alt={`Given with the question, number ${index + 1}`} />
          ))}
        </div>
      )}
      <p class="question-text">{question.text}</p>
      <div class="actions">
        <IconButton icon="pencil" label="Edit the question" onClick={() => (isEdited.value = true)} />
        <Branches turn={question} />
      </div>
    </section>
  );
}

function QuestionEditor({ question, onClose }: { question: Question; onClose: () => void }) {
  const area = useRef<HTMLTextAreaElement>(null);
  const text = useSignal(question.text);
  useEffect(() => {
    area.current?.focus();
    area.current?.setSelectionRange(question.text.length, question.text.length);
    if (area.current) grow(area.current);
  }, []);
  const send = () => {
    if (!text.value.trim() && !question.images.length) return;
    onClose();
    ask(text.value, question.images, question.parent);
  };
  const press = (event: KeyboardEvent) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      event.stopPropagation(); // it would stop an answer too
      onClose();
    }
  };
  return (
    <section class="question question-edited" aria-label="Edit the question">
      <textarea
        ref={area}
        aria-label="Question"
        value={text.value}
        onInput={({ currentTarget }) => {
          text.value = currentTarget.value;
          grow(currentTarget);
        }}
        onKeyDown={press}
      />
      <div class="row">
        <p class="hint">What follows is kept as a branch of its own.</p>
        <button type="button" class="button" onClick={onClose}>
          Cancel
        </button>
        <button type="button" class="button button-main" onClick={send}>
          Ask again
        </button>
      </div>
    </section>
  );
}

/** Steps through what stands in one place: earlier wordings of a question, earlier answers. */
export function Branches({ turn }: { turn: Turn }) {
  const all = siblings(current.value, turn);
  if (all.length < 2) return null;
  const index = all.findIndex(({ id }) => id === turn.id);
  const what = turn.role === "user" ? "question" : "answer";
  const step = (by: number) => {
    const other = all[index + by];
    if (other) change(current.value.id, (conversation) => showing(conversation, other.id));
  };
  return (
    <span class="branches">
      <IconButton icon="left" label={`Earlier ${what}`} isDisabled={index === 0} onClick={() => step(-1)} />
      <span>
        {index + 1} / {all.length}
      </span>
      <IconButton icon="right" label={`Later ${what}`} isDisabled={index === all.length - 1} onClick={() => step(1)} />
    </span>
  );
}
