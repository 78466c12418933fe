import { changeSetup, current, currentModel, models } from "../chat/store";

/** Which of the served models answers. */
export function ModelChoice({ isLabelled = true }: { isLabelled?: boolean }) {
  return (
    <Choice
      label="Model"
      isLabelled={isLabelled}
      value={current.value.setup.model}
      options={models.value.map(({ id }) => [id, id])}
      onChoose={(model) => changeSetup({ model })}
    />
  );
}

/** Which adapter changes it; nothing to choose for a model that has none. */
export function AdapterChoice({ isLabelled = true }: { isLabelled?: boolean }) {
  const adapters = currentModel.value?.openbook.adapters ?? [];
  if (!adapters.length) return null;
  return (
    <Choice
      label="Adapter"
      isLabelled={isLabelled}
      value={current.value.setup.adapter}
      options={[["", "no adapter"], ...adapters.map((name): [string, string] => [name, name])]}
      onChoose={(adapter) => changeSetup({ adapter })}
    />
  );
}

interface ChoiceProps {
  label: string;
  isLabelled: boolean;
  value: string;
  options: [value: string, text: string][];
  onChoose: (value: string) => void;
}

function Choice({ label, isLabelled, value, options, onChoose }: ChoiceProps) {
  return (
    <label class="choice">
      {isLabelled && <span class="field-label">{label}</span>}
      <select aria-label={label} value={value} onChange={({ currentTarget }) => onChoose(currentTarget.value)}>
        {options.map(([name, text]) => (
          <option key={name} value={name} selected={name === value}>
            {text}
          </option>
        ))}
      </select>
    </label>
  );
}
