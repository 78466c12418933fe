import { examplesFor } from "../chat/examples";
import { currentModel } from "../chat/store";
import { send } from "./composer";
import { BookMark } from "./icons";

/** The first page: which model this is, what it was trained on, and problems to try. */
export function Opening() {
  const model = currentModel.value;
  if (!model) return null;
  const { tasks, is_base: isBase } = model.openbook;
  const examples = examplesFor(tasks);
  return (
    <section class="opening" aria-label="Start">
      <BookMark />
      <h1>{tasks.length ? "An open book." : model.id}</h1>
      {tasks.length > 0 ? (
        <p class="lead">
          {model.id} was trained on {tasks.length} {tasks.length === 1 ? "kind" : "kinds"} of problems:{" "}
          <em>{listed(tasks)}</em>. Asked for anything else, it may be wrong.
        </p>
      ) : isBase ? (
        <p class="lead">This model has no chat template: it goes on with a text, and each text stands alone.</p>
      ) : (
        <p class="lead">Ask it anything. What it says may be wrong.</p>
      )}
      {examples.length > 0 && (
        <ul class="examples" aria-label="Problems to try">
          {examples.map(({ task, title, text }) => (
            <li key={task}>
              <button type="button" class="example" onClick={() => send(text)}>
                <span class="example-title">{title}</span>
                <span class="example-text">{shown(text)}</span>
              </button>
            </li>
          ))}
        </ul>
      )}
    </section>
  );
}

/** The last line of a problem; its arrow stays in one piece. */
const shown = (text: string): string => (text.trim().split("\n").at(-1) ?? "").replace("->", "-\u2060>");

function listed(tasks: readonly string[]): string {
  const names = tasks.map((task) => task.replaceAll("_", " "));
  return names.length < 2 ? (names[0] ?? "") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}
