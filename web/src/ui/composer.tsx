import { signal, useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { ask, currentRun, stop } from "../chat/answering";
import { hasFault } from "../chat/sampling";
import { changeSetup, current, currentModel, notice } from "../chat/store";
import { Icon, IconButton } from "./icons";
import { isSettingsOpen } from "./settings";

const IMAGE_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MAX_IMAGE_BYTES = 8 * 1024 * 1024;

/** Where the cursor should be: moves the focus to the question. */
export const focusQuestion = (): void => document.getElementById("question")?.focus();

const text = signal("");
const images = signal<string[]>([]);

/** Asks, if the settings and the model allow it. */
export function send(question: string, pictures: string[] = []): boolean {
  if (!currentModel.value || (!question.trim() && !pictures.length)) return false;
  if (hasFault(current.value.setup.sampling)) {
    isSettingsOpen.value = true;
    return false;
  }
  ask(question, pictures);
  return true;
}

export function Composer() {
  const area = useRef<HTMLTextAreaElement>(null);
  const picker = useRef<HTMLInputElement>(null);
  const isOver = useSignal(false);
  const model = currentModel.value?.openbook;
  const isRunning = currentRun.value !== undefined;

  useEffect(() => {
    if (area.current) grow(area.current);
  }, [text.value]);
  useEffect(focusQuestion, [current.value.id]);

  const submit = () => {
    if (isRunning || !send(text.value, images.value)) return;
    text.value = "";
    images.value = [];
    focusQuestion();
  };
  const press = (event: KeyboardEvent) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  };
  const paste = (event: ClipboardEvent) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) event.preventDefault();
    void add(files);
  };
  const drop = (event: DragEvent) => {
    event.preventDefault();
    isOver.value = false;
    void add([...(event.dataTransfer?.files ?? [])]);
  };

  return (
    <form
      class={`composer ${isOver.value ? "composer-over" : ""}`}
      aria-label="Ask"
      onSubmit={(event) => {
        event.preventDefault();
        submit();
      }}
      onDragOver={(event) => {
        event.preventDefault();
        isOver.value = true;
      }}
      onDragLeave={() => (isOver.value = false)}
      onDrop={drop}
    >
      {images.value.length > 0 && (
        <ul class="pictures" aria-label="Images to send">
          {images.value.map((url, index) => (
            <li key={url.slice(-64)}>
              <img src={url} alt={`To send, number ${index + 1}`} />
              <IconButton
                icon="close"
                label={`Remove image ${index + 1}`}
                onClick={() => (images.value = images.value.filter((other) => other !== url))}
              />
            </li>
          ))}
        </ul>
      )}
      <textarea
        id="question"
        ref={area}
        rows={1}
        aria-label="Your question"
        placeholder={model?.is_base ? "A text to go on with" : "Ask a question"}
        value={text.value}
        onInput={({ currentTarget }) => (text.value = currentTarget.value)}
        onKeyDown={press}
        onPaste={paste}
      />
      <div class="row">
        {model?.sees_images && (
          <>
            <IconButton icon="picture" label="Add an image" onClick={() => picker.current?.click()} />
            <input
              ref={picker}
              type="file"
              accept={IMAGE_TYPES.join(",")}
              multiple
              hidden
              onChange={({ currentTarget }) => {
                void add([...(currentTarget.files ?? [])]);
                currentTarget.value = "";
              }}
            />
          </>
        )}
        {model && model.efforts.length > 0 && <Effort efforts={model.efforts} />}
        <span class="hint keys">Enter sends, Shift+Enter breaks the line{isRunning ? ", Esc stops" : ""}</span>
        {isRunning ? (
          <button type="button" class="send" aria-label="Stop" title="Stop (Esc)" onClick={() => stop()}>
            <Icon name="stop" />
          </button>
        ) : (
          <button
            type="submit"
            class="send"
            aria-label="Send"
            title="Send (Enter)"
            disabled={!model || (!text.value.trim() && !images.value.length)}
          >
            <Icon name="send" />
          </button>
        )}
      </div>
    </form>
  );
}

/** How much the model may think. */
function Effort({ efforts }: { efforts: readonly string[] }) {
  const { effort } = current.value.setup;
  return (
    <fieldset class="effort">
      <legend>Effort</legend>
      {efforts.map((name) => (
        <label key={name} title={`Reasoning effort: ${name}`}>
          <input
            type="radio"
            name="effort"
            value={name}
            checked={name === effort}
            onChange={() => changeSetup({ effort: name })}
          />
          <span>{name}</span>
        </label>
      ))}
    </fieldset>
  );
}

async function add(files: readonly File[]): Promise<void> {
  const model = currentModel.value;
  if (!files.length || !model) return;
  if (!model.openbook.sees_images) {
    notice.value = { text: `${model.id} does not see images: choose a model that does.` };
    return;
  }
  for (const file of files) {
    if (!IMAGE_TYPES.includes(file.type)) {
      notice.value = { text: `${file.name} is no image that can be sent: expected PNG, JPEG, WebP or GIF.` };
    } else if (file.size > MAX_IMAGE_BYTES) {
      notice.value = { text: `${file.name} is too large: expected at most 8 MB; make it smaller.` };
    } else {
      const url = await dataUrl(file);
      if (!images.value.includes(url)) images.value = [...images.value, url];
    }
  }
}

function dataUrl(file: File): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result as string);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** Makes a field as tall as its text; the style sheet sets the limit. */
export function grow(area: HTMLTextAreaElement): void {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}
