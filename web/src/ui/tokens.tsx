import { useSignal } from "@preact/signals";
import { useId, useLayoutEffect, useRef } from "preact/hooks";
import type { TokenLogprob } from "../api/types";

interface TokenViewProps {
  tokens: TokenLogprob[];
  label: string;
}

/** Tokens, tinted by how unlikely each was; the one under the pointer or reached by arrow keys shows its alternatives. */
export function TokenView({ tokens, label }: TokenViewProps) {
  const active = useSignal(-1);
  const id = useId();
  const token = tokens[active.value];

  const press = (event: KeyboardEvent) => {
    const last = tokens.length - 1;
    const steps: Record<string, number> = {
      ArrowRight: Math.min(active.value + 1, last),
      ArrowLeft: Math.max(active.value - 1, 0),
      Home: 0,
      End: last,
    };
    const next = steps[event.key];
    if (next === undefined) return;
    event.preventDefault();
    active.value = next;
  };
  const point = ({ target }: MouseEvent) => {
    const index = (target as HTMLElement).dataset.index;
    if (index !== undefined) active.value = Number(index);
  };

  return (
    // biome-ignore lint/a11y/noStaticElementInteractions: it only notices that the pointer has left
    <div onMouseLeave={() => (active.value = -1)}>
      <div
        class="tokens"
        role="listbox"
        tabIndex={0}
        aria-label={`${label}; arrow keys go from one to the next`}
        aria-activedescendant={token ? `${id}-${active.value}` : undefined}
        onKeyDown={press}
        onMouseOver={point}
        onFocus={() => (active.value = Math.max(active.value, 0))}
        onBlur={() => (active.value = -1)}
      >
        {tokens.map((each, index) => (
          // biome-ignore lint/a11y/useFocusableInteractive: the list has the focus, and names the active option
          <span
            key={index}
            id={`${id}-${index}`}
            data-index={index}
            class={`token token-${doubt(each.logprob)}`}
            role="option"
            aria-selected={index === active.value}
            aria-label={`${visible(each.token)}, ${percent(each.logprob)}`}
          >
            {each.token}
          </span>
        ))}
      </div>
      {token && <Alternatives token={token} place={() => document.getElementById(`${id}-${active.value}`)} />}
    </div>
  );
}

interface AlternativesProps {
  token: TokenLogprob;
  place: () => HTMLElement | null;
}

const GAP_PX = 6;

/** A card beside a token, above or below it, whichever has room. */
function Alternatives({ token, place }: AlternativesProps) {
  const card = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const at = place()?.getBoundingClientRect();
    if (!at || !card.current) return;
    card.current.showPopover(); // above all else, and not cut off where the thread ends
    const { offsetWidth, offsetHeight, style } = card.current;
    const isBelow = at.bottom + GAP_PX + offsetHeight <= innerHeight;
    style.left = `${Math.max(GAP_PX, Math.min(at.left, innerWidth - offsetWidth - GAP_PX))}px`;
    style.top = `${isBelow ? at.bottom + GAP_PX : at.top - GAP_PX - offsetHeight}px`;
  }, [token]);
  const others = token.top_logprobs ?? [];
  const rows = others.some((other) => other.token === token.token) ? others : [token, ...others];
  return (
    <div class="alternatives" ref={card} role="status" popover="manual">
      {rows.map((row) => (
        <div key={row.token} class={row.token === token.token ? "alternative chosen" : "alternative"}>
          <code>{visible(row.token)}</code>
          <meter min={0} max={1} value={Math.exp(row.logprob)} aria-label={`Probability of ${visible(row.token)}`} />
          <span>{percent(row.logprob)}</span>
        </div>
      ))}
    </div>
  );
}

/** From 0, as good as certain, to 4, a surprise. */
function doubt(logprob: number): number {
  const probability = Math.exp(logprob);
  return [0.95, 0.75, 0.5, 0.2].filter((limit) => probability < limit).length;
}

function percent(logprob: number): string {
  const share = Math.exp(logprob) * 100;
  if (share > 0 && share < 0.1) return "under 0.1%";
  return `${share.toFixed(share > 99.9 && share < 100 ? 2 : 1)}%`;
}

/** White space made visible. */
const visible = (token: string): string =>
  token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(nothing)";
