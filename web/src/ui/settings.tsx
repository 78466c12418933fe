import { signal } from "@preact/signals";
import { useId } from "preact/hooks";
import { FIELDS, type Field, fault, NO_SAMPLING, numChosen, type SamplingText } from "../chat/sampling";
import { apiKey, changeSetup, current, currentModel, enterKey } from "../chat/store";
import { AdapterChoice, ModelChoice } from "./choice";
import { Dialog } from "./dialog";

export const isSettingsOpen = signal(false);

/** The panel: what the next answers of this conversation are made with. */
export function Settings() {
  if (!isSettingsOpen.value) return null;
  const { system, sampling } = current.value.setup;
  const model = currentModel.value?.openbook;
  const choose = (edit: Partial<SamplingText>) => changeSetup({ sampling: { ...sampling, ...edit } });
  const fields = FIELDS.filter(({ name }) => name !== "thinking_budget" || model?.has_thinking);
  return (
    <Dialog title="Settings" class="panel" onClose={() => (isSettingsOpen.value = false)}>
      <section class="group">
        <h3>Model</h3>
        <ModelChoice />
        <AdapterChoice />
        {model && (
          <p class="hint">
            Context of {model.max_model_len.toLocaleString("en")} tokens, profile {model.profile}.
          </p>
        )}
      </section>
      {!model?.is_base && (
        <section class="group">
          <h3>
            <label for="system">System prompt</label>
          </h3>
          <textarea
            id="system"
            rows={3}
            placeholder="None"
            value={system}
            onInput={({ currentTarget }) => changeSetup({ system: currentTarget.value })}
          />
        </section>
      )}
      <section class="group">
        <h3>Sampling</h3>
        <p class="hint">What is left empty stays as the model has it.</p>
        {fields.map((field) => (
          <NumberField
            key={field.name}
            field={field}
            text={sampling[field.name]}
            onText={(text) => choose({ [field.name]: text })}
          />
        ))}
        <label class="field field-tall">
          <span class="field-label">Stop strings</span>
          <textarea
            rows={2}
            placeholder="None"
            aria-describedby="stop-help"
            value={sampling.stop}
            onInput={({ currentTarget }) => choose({ stop: currentTarget.value })}
          />
          <span id="stop-help" class="hint">
            one a line; \n stands for a line's end
          </span>
        </label>
        <label class="switch">
          <input
            type="checkbox"
            checked={sampling.hasProbabilities}
            onChange={({ currentTarget }) => choose({ hasProbabilities: currentTarget.checked })}
          />
          <span>Token probabilities</span>
          <span class="hint">each token of the next answers with the likeliest ones in its place</span>
        </label>
        <button
          type="button"
          class="button"
          disabled={numChosen(sampling) === 0}
          onClick={() => changeSetup({ sampling: NO_SAMPLING })}
        >
          Back to the model's own
        </button>
      </section>
      {apiKey.value && (
        <section class="group">
          <h3>API key</h3>
          <p class="hint">Kept in this browser, and sent to this server only.</p>
          <button type="button" class="button" onClick={() => void enterKey("")}>
            Forget the key
          </button>
        </section>
      )}
    </Dialog>
  );
}

interface NumberFieldProps {
  field: Field;
  text: string;
  onText: (text: string) => void;
}

function NumberField({ field, text, onText }: NumberFieldProps) {
  const id = useId();
  const wrong = fault(field, text);
  return (
    <div class="field">
      <label class="field-label" for={id}>
        {field.label}
      </label>
      <input
        id={id}
        type="text"
        inputMode="decimal"
        autoComplete="off"
        placeholder={field.unset}
        aria-invalid={wrong !== ""}
        aria-describedby={`${id}-help`}
        value={text}
        onInput={({ currentTarget }) => onText(currentTarget.value)}
      />
      <span id={`${id}-help`} class={wrong ? "fault" : "hint"}>
        {wrong || field.help}
      </span>
    </div>
  );
}
