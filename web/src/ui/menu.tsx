import { useSignal } from "@preact/signals";
import { useEffect, useId, useRef } from "preact/hooks";
import { Icon, IconButton, type IconName } from "./icons";

export interface MenuItem {
  icon: IconName;
  label: string;
  onChoose: () => void;
}

/** A button that opens a list of things to do. */
export function Menu({ label, items }: { label: string; items: MenuItem[] }) {
  const isOpen = useSignal(false);
  const frame = useRef<HTMLDivElement>(null);
  const id = useId();
  const button = () => frame.current?.querySelector<HTMLElement>("button");
  const entries = () => [...(frame.current?.querySelectorAll<HTMLElement>("[role=menuitem]") ?? [])];

  useEffect(() => {
    if (isOpen.value) entries()[0]?.focus();
  }, [isOpen.value]);

  const close = () => {
    isOpen.value = false;
    button()?.focus();
  };
  const press = (event: KeyboardEvent) => {
    if (!isOpen.value) return;
    const all = entries();
    const at = all.indexOf(document.activeElement as HTMLElement);
    const next: Record<string, number> = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: -1 };
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (event.key in next) {
      event.preventDefault();
      all.at((next[event.key] ?? 0) % all.length)?.focus();
    }
  };
  const leave = (event: FocusEvent) => {
    if (!frame.current?.contains(event.relatedTarget as Node | null)) isOpen.value = false;
  };

  return (
    // biome-ignore lint/a11y/noStaticElementInteractions: it hears keys of the buttons inside
    <div class="menu" ref={frame} onKeyDown={press} onFocusOut={leave}>
      <button
        type="button"
        class="icon-button"
        aria-label={label}
        title={label}
        aria-haspopup="menu"
        aria-expanded={isOpen.value}
        aria-controls={isOpen.value ? id : undefined}
        onClick={() => (isOpen.value = !isOpen.value)}
      >
        <Icon name="more" />
      </button>
      {isOpen.value && (
        <div id={id} role="menu" aria-label={label} class="menu-list">
          {items.map((item) => (
            <button
              key={item.label}
              type="button"
              role="menuitem"
              tabIndex={-1}
              onClick={() => {
                close();
                item.onChoose();
              }}
            >
              <Icon name={item.icon} /> {item.label}
            </button>
          ))}
        </div>
      )}
    </div>
  );
}

/** The button that shows or hides the list of conversations where both do not fit. */
export function ContentsButton({ isOpen, onClick }: { isOpen: boolean; onClick: () => void }) {
  const label = isOpen ? "Close the contents" : "Open the contents";
  return <IconButton icon={isOpen ? "close" : "menu"} label={label} class="contents-button" onClick={onClick} />;
}
